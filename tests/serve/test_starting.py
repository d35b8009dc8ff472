"""What a server answers until its model is there."""

from __future__ import annotations

import httpx
import pytest

from ldm2.serve import server, starting


@pytest.fixture
def place():
    with server.listening("127.0.0.1", 0) as found:
        yield found


def get(place, path, **headers):
    return httpx.get(f"http://127.0.0.1:{place.getsockname()[1]}{path}", headers=headers, timeout=60)


def test_the_model_its_license_and_what_is_fetched_of_it_are_shown(place, tmp_path):
    blobs = tmp_path / "models--cvssp--audioldm2" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(bytes(1000))
    with starting.answering(place, "audioldm2", tmp_path):
        page = get(place, "/", accept="text/html")
        assert page.status_code == 200 and all(each in page.text for each in ("CC-BY-NC-SA-4.0", "4.5 GB", "<progress"))
        state = get(place, "/health")
        assert state.status_code == 503
        assert (state.json()["bytes"], state.json()["download"]) == (1000, 4_474_000_000)
        refused = get(place, "/v1/jobs")
        assert refused.status_code == 503 and "audioldm2" in refused.json()["error"]["message"]


def test_an_open_page_is_told_why_there_will_be_no_server_and_the_socket_stays(place, monkeypatch):
    seen = []
    monkeypatch.setattr(starting.time, "sleep", lambda seconds: seen.append(get(place, "/health").json()["error"]))
    with pytest.raises(OSError, match="no such file"), starting.answering(place, "./<b>"):
        page = get(place, "/", accept="text/html").text
        assert "./&lt;b&gt;" in page and "./<b>" not in page
        raise FileNotFoundError("no such file or folder: ./<b>")
    assert seen == ["no such file or folder: ./<b>"]
    with starting.answering(place, "tiny"):
        assert get(place, "/health").json()["model"] == "tiny"
