"""The server on Ray: jobs are found whichever model makes them. Two models, on this machine."""

from __future__ import annotations

import io
import socket
import time

import httpx
import numpy as np
import pytest
import soundfile

from ldm2 import audio
from tests.helpers import tone

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

from ldm2.serve import ray as on_ray  # noqa: E402  (needs what is looked for above)

SHORT = {"prompt": "a low hum", "steps": 2, "seconds": 0.4}


@pytest.fixture(scope="module")
def client():
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    serve.run(on_ray.app({"model": "tiny", "min_replicas": "2", "max_replicas": "2", "queue": "8"}))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()
    ray.shutdown()


def ended(client, job):
    while (found := client.get(job["url"]).json())["status"] in ("queued", "in_progress"):
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_two_models_and_one_list_of_jobs(client, pipe, tmp_path):
    jobs = [client.post("/v1/jobs", json=SHORT | {"seed": seed, "eta": seed / 10}).json() for seed in range(6)]
    done = [ended(client, job) for job in jobs]
    assert [job["status"] for job in done] == ["completed"] * 6
    assert len({job["id"] for job in client.get("/v1/jobs").json()["data"]}) == 6
    samples = soundfile.read(io.BytesIO(client.get(done[0]["results"][0]["url"]).content))[0]
    expected = pipe.generate(**SHORT, seed=0).channels[0, 0]
    assert np.abs(samples - expected).max() <= 1e-4 * np.abs(expected).max() + 2**-15
    two = [client.post("/v1/jobs", json=SHORT | {"steps": 900, "seconds": 10, "eta": eta}).json() for eta in (0, 1)]
    while any(client.get(job["url"]).json()["step"] < 1 for job in two):                    # both run at once
        time.sleep(0.02)
    for job in two:
        client.delete(job["url"])
        assert ended(client, job)["status"] == "cancelled"
    audio.write(tmp_path / "bell.wav", tone(0.4), 16_000)
    form = {"kind": "transfer", "prompt": "wind", "steps": "2"}
    edit = client.post("/v1/jobs", data=form, files={"audio": ("bell.wav", (tmp_path / "bell.wav").read_bytes())})
    assert ended(client, edit.json())["status"] == "completed"
    answer = client.post("/v1/audio/generate", json=SHORT | {"response_format": "flac"})
    assert answer.status_code == 200 and answer.content[:4] == b"fLaC"
    failed = ended(client, client.post("/v1/jobs", json=SHORT | {"steps": 5000}).json())
    assert "steps" in failed["error"]["message"] and failed["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/jobs", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("args, words", [({"x": "1"}, "unknown argument 'x'"), ({"queue": "0"}, "queue must be"),
                                         ({"max_replicas": "two"}, "max_replicas must be")])
def test_wrong_arguments_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        on_ray.app(args)
