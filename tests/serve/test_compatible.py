"""Requests in the shapes of other servers, while the client waits."""

from __future__ import annotations

import io
import json
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from fastapi.responses import Response

from ldm2 import audio
from ldm2.serve import compatible
from tests.serve.client import serving

SHORT = {"input": "a low hum", "num_inference_steps": 2, "audio_length": 0.4}


def test_the_body_of_vllm_omni_makes_a_sound_at_once(client, pipe, tmp_path):
    answer = client.post("/v1/audio/generate", json=SHORT | {
        "model": "tiny", "response_format": "flac", "seed": 3, "negative_prompt": None, "guidance_scale": 2})
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/flac"
    expected = pipe.generate("a low hum", steps=2, seconds=0.4, seed=3, guidance_scale=2).channels[0, 0]
    assert np.abs(soundfile.read(io.BytesIO(answer.content))[0] - expected).max() <= 2**-15
    (tmp_path / "x.flac").write_bytes(answer.content)
    inside, header = json.loads(audio.read_metadata(tmp_path / "x.flac")["comment"]), answer.headers
    told = json.loads(header["x-settings"])
    assert header["x-seed"] == "3" and told["seed"] == inside["seed"] == 3
    assert {name: inside[name] for name in told} == told
    assert header["x-job-id"] not in client.get("/v1/jobs").text and list(client.jobs.folder.path.iterdir()) == [
        client.jobs.folder.path / "lock"]


def test_of_several_candidates_the_best_comes(client, pipe):
    answer = client.post("/v1/audio/generate", json={"prompt": "wind", "steps": 2, "seconds": 0.4, "num_waveforms": 3,
                                                     "seed": 1})
    best = pipe.generate("wind", steps=2, seconds=0.4, seed=1, num_waveforms=3)
    assert answer.headers["x-seed"] == str(best.seeds[0])
    assert float(answer.headers["x-score"]) == pytest.approx(best.scores[0], abs=1e-5)


def test_pcm_is_the_samples_alone(client):
    wav = client.post("/v1/audio/generate", json=SHORT | {"seed": 1})
    pcm = client.post("/v1/audio/generate", json=SHORT | {"seed": 1, "response_format": "pcm"})
    samples = soundfile.read(io.BytesIO(wav.content), dtype="int16")[0]
    assert pcm.content == samples.astype("<i2").tobytes() and pcm.headers["content-type"] == "audio/pcm;rate=16000"


@pytest.mark.parametrize("wrong, status, param, words", [
    ({"input": "x", "prompt": "y"}, 400, "input", "the same"),
    ({"input": "x", "speed": 2}, 400, "speed", "must be 1"),
    ({"input": "x", "audio_start": 1}, 400, "audio_start", "must be 0"),
    ({"input": "x", "response_format": "aac"}, 400, "format", "unknown format 'aac'"),
    ({"input": "x", "model": "other"}, 404, "model", "the model here is 'tiny'"),
    ({"input": "x", "kind": "transfer"}, 400, "kind", "POST /v1/jobs"),
    ({}, 400, None, "a prompt is needed"),
])
def test_what_does_not_do_is_told_in_one_line(client, wrong, status, param, words):
    answer = client.post("/v1/audio/generate", json=wrong)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and words in error["message"]


@pytest.mark.parametrize("given, scale", [({}, 2.5), ({"prompt_influence": 0}, 1), ({"prompt_influence": 0.6}, 4)])
def test_clients_of_elevenlabs_are_served(client, given, scale):
    answer = client.post("/v1/sound-generation?output_format=pcm_16000", headers={"xi-api-key": "any"}, json={
        "text": "a low hum", "duration_seconds": 0.5, "model_id": "eleven_text_to_sound_v2", **given})
    assert answer.status_code == 200 and len(answer.content) == 2 * 8000
    assert json.loads(answer.headers["x-settings"])["guidance_scale"] == pytest.approx(scale)


def test_elevenlabs_formats_and_loops(client):
    answer = client.post("/v1/sound-generation", json={"text": "hum", "duration_seconds": 0.5, "loop": True})
    about = soundfile.info(io.BytesIO(answer.content))
    assert (about.format, about.samplerate) == ("MP3", 44_100) and answer.headers["content-type"] == "audio/mpeg"
    assert json.loads(answer.headers["x-settings"])["loop"] is True


@pytest.mark.parametrize("wrong, param", [
    ({}, "text"), ({"text": "x", "duration_seconds": 31}, "duration_seconds"), ({"text": "x", "loop": "no"}, "loop"),
    ({"text": "x", "prompt_influence": 2}, "prompt_influence"), ({"text": "x", "steps": 3}, "steps"),
])
def test_elevenlabs_limits_hold(client, wrong, param):
    answer = client.post("/v1/sound-generation", json=wrong)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert client.post("/v1/sound-generation?output_format=ulaw_8000", json={"text": "x"}).status_code == 400


def test_a_model_that_does_not_speak_says_so(client):
    answer = client.post("/v1/audio/speech", json={"model": "tts-1", "input": "hello", "voice": "alloy"})
    assert answer.status_code == 404 and "does not speak" in answer.json()["error"]["message"]


def test_a_client_that_goes_away_cancels_its_job(client):
    body = json.dumps({"prompt": "x", "steps": 1000, "seconds": 10}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(b"POST /v1/audio/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(body), body))
        while not client.jobs.running():
            time.sleep(0.01)
    start = time.process_time()
    while client.jobs.all():
        time.sleep(0.01)
    assert time.process_time() - start < 5 and client.jobs.counts() == {}


def test_a_speech_model_is_asked_for_who_speaks_and_what(client, monkeypatch):
    asked = []

    async def sound(request, api, given):
        asked.append(given)
        return Response()

    monkeypatch.setattr(compatible, "_sound", sound)
    monkeypatch.setattr(client.app.state, "api", replace(client.app.state.api, about=replace(
        client.app.state.api.about, is_speech_model=True)))
    said = {"input": "hello", "model": "tiny"}
    for more in ({"voice": "alloy"}, {"voice": "a calm man"}, {"voice": "a man", "instructions": "a loud child"}):
        assert client.post("/v1/audio/speech", json=said | more).status_code == 200
    assert [each["prompt"] for each in asked] == [compatible.SPEAKER, "a calm man", "a loud child"]
    assert asked[0] | {"prompt": ""} == {"prompt": "", "transcription": "hello", "format": "mp3", "model": "tiny"}
    for wrong, param in (({"voice": "alloy"}, "input"), (said | {"speed": 2}, "speed"), (said | {"x": 1}, "x")):
        assert client.post("/v1/audio/speech", json=wrong).json()["error"]["param"] == param


@pytest.mark.slow
def test_speech_models_speak(tmp_path):
    import ldm2
    from benchmarks import checkpoints

    pipe = ldm2.load(checkpoints.save_speech(tmp_path))
    pipe.text.phonemes.phonemize = pipe.text.phonemes.tokenize_ipa      # phonemizer's part, which needs espeak-ng
    pipe.defaults |= {"steps": 2, "seconds": 0.4}
    with serving(pipe) as client:
        answer = client.post("/v1/audio/speech", json={"input": "həlˈo", "voice": "a man", "response_format": "wav"})
        assert answer.status_code == 200, answer.text
        assert soundfile.info(io.BytesIO(answer.content)).frames == 6400
        assert client.get("/v1/capabilities").json()["model"]["speech"] is True
