"""What can be had of results and files: formats, pictures, parts, settings; and the page where gradio is missing."""

from __future__ import annotations

import importlib.util
import io
import re

import numpy as np
import pytest
import soundfile

from ldm2.audio import recorded
from ldm2.serve import page
from tests.helpers import tone


@pytest.fixture(scope="module")
def job(client):
    return client.done(client.ask(prompt="a low bell", steps=2, seconds=0.5, seed=3))


def test_a_sound_is_converted_and_keeps_its_settings(client, job, tmp_path):
    given, _ = soundfile.read(io.BytesIO(client.get(job["results"][0]["url"]).content), dtype="int16")
    for form in ("wav", "flac", "ogg", "mp3"):
        answer = client.get(job["results"][0]["url"], params={"n": 1, "format": form})
        path = tmp_path / f"got.{form}"
        path.write_bytes(answer.content)
        assert recorded.read(path)["prompt"] == "a low bell" and answer.headers["content-type"].startswith("audio/")
        if form in ("wav", "flac"):
            assert np.array_equal(soundfile.read(path, dtype="int16")[0], given)


@pytest.mark.parametrize(("query", "status", "message"), [
    ("n=1&format=exe", 400, "unknown format 'exe'"), ("n=1&format=../x", 400, "unknown format"),
    ("n=2&format=flac", 404, "n must be from 1 to 1, got 2"), ("n=0", 400, "n: "),
])
def test_what_is_no_format_or_no_sound_is_refused(client, job, query, status, message):
    answer = client.get(f"{job['url']}/content?{query}")
    assert answer.status_code == status and message in answer.json()["error"]["message"]


@pytest.mark.parametrize(("asked", "start", "stop"), [
    ("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-7", -7, None), ("bytes=5-99999999", 5, None),
])
def test_a_part_of_a_file_can_be_asked_for(client, job, asked, start, stop):
    url = job["results"][0]["url"]
    whole = client.get(url).content
    answer = client.get(url, headers={"Range": asked})
    assert answer.status_code == 206 and answer.content == whole[start:stop]
    first = len(whole) + start if start < 0 else start
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=", "bytes=-", "bytes=9-3", "bytes=99999999-", "bytes=0-1,4-5", "lines=1-2"])
def test_of_a_part_that_makes_no_sense_the_whole_comes(client, job, asked):
    answer = client.get(job["results"][0]["url"], headers={"Range": asked})
    assert answer.status_code == 200 and len(answer.content) == job["results"][0]["bytes"]


def test_a_result_has_a_picture(client, job):
    answer = client.get(f"{job['url']}/spectrogram", params={"n": 1})
    assert answer.headers["content-type"] == "image/png" and answer.content[:8] == b"\x89PNG\r\n\x1a\n"
    assert client.get(f"{job['url']}/spectrogram", params={"n": 2}).status_code == 404


def test_settings_are_read_from_files_and_make_a_job(client, pipe, tmp_path):
    [path] = pipe.generate("wind", steps=2, seconds=0.5, seed=7, guidance_scale=2.0).save(tmp_path / "old.flac")
    settings = client.post("/v1/settings", files={"file": ("old.flac", path.read_bytes())}).json()
    assert {name: settings[name] for name in ("prompt", "steps", "seed", "guidance_scale", "model")} == {
        "prompt": "wind", "steps": 2, "seed": 7, "guidance_scale": 2.0, "model": "tiny"}
    again = client.done(client.ask(**settings, format="flac"))
    made = client.get(again["results"][0]["url"]).content
    assert np.array_equal(*(soundfile.read(source, dtype="int16")[0] for source in (io.BytesIO(made), path)))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.wav", b"RIFF", r"x\.wav cannot be read"), ("x.json", b"{", r"x\.json is not JSON"), ("x.flac", b"", "is empty"),
    ("../../x.toml", b"steps = 0", r"^x\.toml: steps.*0"), ("x.json", b'{"speed": 1}', "speed"),
])
def test_a_file_without_settings_is_refused_by_its_own_name(client, name, content, message):
    answer = client.post("/v1/settings", files={"file": (name, content)})
    told = answer.json()["error"]["message"]
    assert answer.status_code == 400 and re.search(message, told) and "/" not in told
    assert not list(client.jobs.folder.path.glob("tmp*"))


def test_a_plain_sound_has_no_settings(client, tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(0.1), 16_000)
    answer = client.post("/v1/settings", files={"file": ("x.wav", (tmp_path / "x.wav").read_bytes())})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("x.wav holds no settings")
    assert client.post("/v1/settings", data={"file": "x.wav"}).status_code == 400


def test_without_gradio_the_page_says_how_to_install_it(pipe, monkeypatch):
    from tests.serve.client import serving

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else real(name))
    with serving(pipe, prepare=page.mount) as client:
        answer = client.get("/")
        assert answer.status_code == 200 and "pip install 'ldm2[ui]'" in answer.text
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.fixture(scope="module")
def fields(pipe):
    pytest.importorskip("gradio")
    from ldm2.serve import schemas
    from ldm2.serve.engine import about
    from ldm2.serve.limits import Limits
    from ldm2.serve.page.fields import Fields

    return Fields(schemas.capabilities(about(pipe), Limits()))


@pytest.mark.parametrize(("name", "value", "words"), [
    ("steps", "", []), ("steps", None, []), ("steps", "1.5", ["1.5"]), ("seconds", 2.56, ["2.56"]),
    ("num_waveforms", 2, ["2"]), ("loop", False, []), ("loop", True, ["true"]), ("paste", True, []),
    ("paste", False, ["false"]), ("times", "0.5:1, 2:", ["0.5:1", "2:"]), ("times", "[[0.5, 1]]", ["[[0.5, 1]]"]),
    ("prompt", "rain, and wind", ["rain, and wind"]), ("guidance_interval", " 0:0.7 ", ["0:0.7"]),
])
def test_what_stands_in_an_input_is_sent_as_words(fields, name, value, words):
    from ldm2.serve.page.fields import words as sent

    assert sent(fields.options[name], value) == words


@pytest.mark.parametrize(("name", "value", "text"), [
    ("steps", 4, "4"), ("guidance_scale", 2.25, "2.25"), ("guidance_interval", [0.0, 0.7], "0:0.7"),
    ("times", [[0.5, 1.0], [2.0, None]], "0.5:1, 2:"), ("prompt", None, ""), ("loop", None, False),
    ("paste", None, True), ("paste", False, False), ("sampler", "euler", "euler"), ("sampler", None, ""),
])
def test_settings_are_shown_as_they_are_written(fields, name, value, text):
    from ldm2.serve.page.fields import shown

    assert shown(fields.options[name], value) == text
