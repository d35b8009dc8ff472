"""What must not come in: one line and a 4xx each, and a server that lives."""

from __future__ import annotations

import json

import pytest

from ldm2 import audio
from ldm2.serve.errors import failed
from ldm2.serve.limits import Limits
from tests.helpers import tone
from tests.serve.client import serving

SHORT = {"prompt": "hum", "steps": 2, "seconds": 0.4}


def refused(answer, status=400):
    """The error of an answer: one line, in the one shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["message"].count("\n") == 0
    assert "Traceback" not in error["message"] and "/tmp" not in error["message"] and len(error["message"]) < 800
    return error


@pytest.mark.parametrize("body, param, words", [
    ({"steps": 1.5}, "steps", "steps must be a positive integer, got 1.5"),
    ({"steps": "5"}, "steps", "positive integer"), ({"steps": True}, "steps", "positive integer"),
    ({"cache_interval": 10**400}, "cache_interval", "below 2"),
    ({"steps": 10**400}, "steps", "steps"), ({"steps": 5000}, "steps", "1000"),
    ({"seconds": 10**400}, "seconds", "seconds"), ({"seconds": -1}, "seconds", "above 0"),
    ({"seconds": [1]}, "seconds", "number"), ({"seconds": 601}, "seconds", "600"), ({"seconds": 1e-9}, "seconds", ""),
    ({"guidance_scale": {}}, "guidance_scale", "finite number"), ({"loop": "yes"}, "loop", "True or False"),
    ({"loop": []}, "loop", "True or False"), ({"sampler": "dimm"}, "sampler", "choose from ddim"),
    ({"seed": [1, 2]}, "seed", "one number"), ({"seed": 2**64}, "seed", "2**64 - 1"),
    ({"num_waveforms": 17}, "num_waveforms", "at most 16"), ({"num_waveforms": 9, "seconds": 100}, "seconds", "900 s"),
    ({"prompt": ""}, "prompt", "must not be empty"), ({"prompt": "x" * 2001}, "prompt", "2,000 characters"),
    ({"prompt": ["a", "b"]}, "prompt", "one text"), ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": 5}, "prompt", "string"), ({"prompt": None}, None, "a prompt is needed"),
    ({"prompt_at": [[0.1, "x" * 3000]]}, "prompt_at", "2,000"), ({"prompt_at": [[9, "y"]]}, "prompt_at", "inside"),
    ({"prompt_at": [[n / 200 + 0.001, "y"] for n in range(70)]}, "prompt_at", "at most 64"),
    ({"prompt_at": [1]}, "prompt_at", "list"), ({"negative_prompt": {}}, "negative_prompt", "string"),
    ({"stepz": 3}, "stepz", "did you mean steps?"), ({"num_inference_steps": 3}, "num_inference_steps", "steps here"),
    ({"\ud800": 3}, "\ud800", "no option"), ({"strength": 0.5}, "strength", "generate takes no strength"),
    ({"kind": "reconstruct"}, "kind", "unknown kind"), ({"kind": 5}, "kind", "unknown"), ({"kind": []}, "kind", ""),
    ({"kind": "transfer"}, "audio", "send a form"), ({"kind": "transfer", "task": "generate"}, "kind", "two things"),
    ({"kind": "transfer", "audio": "x.wav"}, "audio", ""), ({"audio": "http://x/y.wav"}, "audio", "no option"),
    ({"input": "/etc/passwd", "kind": "transfer"}, "audio", "send a form"),
    ({"format": "../x"}, "format", "choose from wav"), ({"format": ["wav"]}, "format", "choose from wav"),
    ({"sample_rate": 10**9}, "sample_rate", "at most 192000"), ({"sample_rate": 11_000, "format": "mp3"}, None, "mp3"),
    ({"subtype": "PCM_16", "format": "mp3"}, None, "mp3"), ({"normalize": "loud"}, "normalize", "LUFS"),
    ({"window": 0.1, "overlap": 0.2}, "overlap", "shorter"), ({"eta": 0.5, "sampler": "euler"}, None, "eta"),
    ({"output": "x"}, "output", "an object"), ({"callback": "x"}, "callback", "no option"),
    ({"latents": []}, "latents", "no option"), ({"output": {"path": "x"}}, "output", "an object"),
    ({"lora": ["/etc/passwd"]}, "lora", "here"), ({"lora": "x:2"}, "lora", "here"),
    ({"lora": [["x", 1]]}, "lora", "here"), ({"lora": [5]}, "lora", "FILE:SCALE"),
    ({"transcription": "hello"}, "transcription", "speech"),
])
def test_a_wrong_option_is_told_as_on_the_command_line(client, body, param, words):
    answer = client.post("/v1/jobs", content=json.dumps((SHORT if "kind" not in body else {}) | body).encode())
    told = answer.json()                                   # or it is told by the work alone
    error = client.done(told, "failed")["error"] if answer.status_code == 202 else refused(answer)
    assert words in error["message"] and (param is None or error["param"] == param)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b'{"prompt": "x", "steps": NaN}', b'{"seconds": Infinity}',
    b'{"seconds": -Infinity}', b"[" * 100_000, b'{"a":' * 50_000, b'{"seed": ' + b"9" * 5000 + b"}", b"prompt=x",
])
def test_a_body_that_is_no_object_of_json_is_refused(client, body):
    assert refused(client.post("/v1/jobs", content=body))["code"] in ("invalid_json", "invalid_value")


def test_large_bodies_are_refused_and_answered(client):
    for path in ("/v1/jobs", "/v1/audio/generate", "/v1/sound-generation"):
        assert refused(client.post(path, content=b" " * 300_000), 413)["code"] == "too_large"
    chunks = (b" " * 65_536 for _ in range(64))
    assert refused(client.post("/v1/jobs", content=chunks), 413)["code"] == "too_large"
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert refused(client.post("/v1/jobs", content=bytes(100_000_000), headers=form), 413)["code"] == "too_large"


@pytest.mark.parametrize("body, rest", [
    (b"", ""), (b"", "; boundary=x"), (b"garbage", "; boundary=x"), (b"--x\r\n", "; boundary=x"),
    (b"--x\r\n\r\nhello\r\n--x--", "; boundary=x"), (b"--x--\r\n", "; boundary=x; charset=none"),
    (b'--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--x--\r\n', "; boundary=x"),
    (b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n\xff\r\n--x--\r\n', "; boundary=x"),
    (b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\nhi', "; boundary=x"),
    (b"--x", "; boundary=" + "x" * 9999),
])
def test_a_broken_form_is_refused(client, body, rest):
    refused(client.post("/v1/jobs", content=body, headers={"content-type": f"multipart/form-data{rest}"}))


@pytest.fixture(scope="module")
def bell(tmp_path_factory):
    path = tmp_path_factory.mktemp("bell") / "bell.wav"
    audio.write(path, tone(0.4), 16_000)
    return path


@pytest.mark.parametrize("change, words", [
    (lambda data: b"", "bell.wav is empty"), (lambda data: b"no sound at all", "bell.wav cannot be read"),
    (lambda data: data[:-900], "bell.wav is damaged"), (lambda data: data[:44], "bell.wav"),
    (lambda data: b"\0\0\0\x18ftypM4A " + bytes(50), "ffmpeg -i bell.wav"),
])
def test_a_broken_sound_is_told_as_for_files(client, bell, change, words):
    fields = {"kind": "transfer", "prompt": "hum", "steps": "2"}
    answer = client.post("/v1/jobs", data=fields, files={"audio": ("bell.wav", change(bell.read_bytes()))})
    error = refused(answer)
    assert error["message"].startswith(words) or words in error["message"]
    assert (error["param"], error["code"]) == ("audio", "invalid_audio")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b.wav", "x" * 5000, "lock", "日本"])
def test_names_of_uploads_lead_nowhere(client, bell, name):
    answer = client.post("/v1/jobs", data={"kind": "variations", "steps": "2", "num_waveforms": "1"},
                         files={"audio": (name, bell.read_bytes())})
    if answer.status_code == 202:
        assert client.done(answer.json())["results"]
    else:
        refused(answer)
    inside = {path.name for path in client.jobs.folder.path.iterdir()}
    assert inside <= {job.id for job in client.jobs.all()} | {"lock"}


@pytest.mark.parametrize("fields, param", [
    ({"kind": "generate", "prompt": "x"}, "audio"), ({"kind": "transfer", "steps": "many", "prompt": "x"}, "steps"),
    ({"kind": "inpaint", "prompt": "x"}, None), ({"kind": "inpaint", "times": "x", "prompt": "x"}, "times"),
    ({"kind": "inpaint", "times": "[[", "prompt": "x"}, "times"), ({"kind": "transfer", "steps": ["1", "2"]}, "steps"),
    ({"kind": "transfer", "prompt": "x", "channel": "3"}, None),
    ({"kind": "extend", "prompt": "x", "seconds": "600"}, "seconds"),
    ({"kind": "inpaint", "prompt": "x", "times": "8:9", "steps": "2"}, None),
])
def test_wrong_fields_of_a_form_are_refused(client, bell, fields, param):
    answer = client.post("/v1/jobs", data=fields, files={"audio": ("bell.wav", bell.read_bytes())})
    if answer.status_code == 202:
        error = client.done(answer.json(), "failed")["error"]
        assert error["type"] == "invalid_request_error" and "/" not in error["message"], error
    else:
        assert refused(answer)["param"] == param


def test_other_files_and_two_of_them_are_refused(client, bell):
    data = bell.read_bytes()
    assert refused(client.post("/v1/jobs", files={"other": ("a.wav", data)}))["param"] == "other"
    refused(client.post("/v1/jobs", files=[("audio", ("a.wav", data)), ("audio", ("b.wav", data))]))
    assert refused(client.post("/v1/jobs", data={"audio": "/etc/passwd"}, files={"x": ("", b"")}))


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/jobs/../../etc/passwd", 404), ("GET", "/v1/jobs/%2e%2e%2fetc", 404), ("GET", "/v1/jobs/x", 404),
    ("GET", "/v1/jobs/x/content", 404), ("GET", "/v1/jobs/x/events", 404), ("DELETE", "/v1/jobs/x", 404),
    ("PUT", "/v1/jobs", 405), ("GET", "/v1/audio/generate", 405), ("GET", "/nothing", 404), ("GET", "/%ff%00", 404),
    ("GET", "/v1/jobs/" + "x" * 5000, 404), ("POST", "/metrics", 405),
])
def test_other_addresses_are_refused_in_the_same_shape(client, method, path, status):
    refused(client.request(method, path), status)


@pytest.mark.parametrize("path, allowed", [
    ("/v1/jobs", "GET, POST"), ("/v1/jobs/x", "DELETE, GET"), ("/health", "GET"), ("/v1/audio/speech", "POST"),
])
def test_a_wrong_method_is_told_those_that_do(client, path, allowed):
    assert client.put(path).headers["Allow"] == allowed


def test_a_job_that_fails_tells_no_path_of_the_server(tmp_path):
    folder = tmp_path / "job-1"
    for error in (OSError(28, "No space left on device", str(folder / "sound.wav")),
                  ValueError(f"{folder / 'upload/sound.wav'}: channel must be 0")):
        told = failed(error, folder).message
        assert "sound.wav" in told and "job-1" not in told


def test_what_cannot_be_a_number_in_an_address_is_refused(client):
    job = client.done(client.ask(**SHORT))
    for n in ("0", "-1", "x", "1e9", "9" * 50):
        answer = client.get(f"{job['url']}/content?n={n}")
        assert refused(answer, answer.status_code)["param"] == "n" and answer.status_code in (400, 404)


def test_a_full_queue_and_a_greedy_client_are_told_when_to_come_again(pipe):
    with serving(pipe, Limits(queue=2, pending=2, grace=0)) as client:
        jobs = [client.ask(**SHORT | {"steps": 900, "seconds": 10, "eta": 0.1 * n}) for n in range(2)]
        answer = client.post("/v1/jobs", json=SHORT)
        assert refused(answer, 429)["code"] == "too_many_pending" and int(answer.headers["retry-after"]) >= 1
        for job in jobs:
            client.delete(job["url"])
        client.done(jobs[0], "cancelled")
        client.done(client.ask(**SHORT))
    with serving(pipe, Limits(queue=1, pending=9, grace=0)) as client:
        jobs = [client.ask(**SHORT | {"steps": 900, "seconds": 10})]
        while not client.jobs.running():
            pass
        jobs.append(client.ask(**SHORT | {"eta": 0.5}))
        answer = client.post("/v1/audio/generate", json=SHORT)
        assert refused(answer, 429)["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1


def test_a_key_is_asked_for_and_compared_whole(pipe):
    with serving(pipe, key="sécret") as client:
        assert client.get("/health").status_code == 200
        key = {"authorization": "Bearer sécret".encode()}
        basic = {"authorization": "Basic dXNlcjpzw6ljcmV0"}
        wrong = [{}, {"authorization": "Bearer secret"}, {"authorization": "Bearer"}, {"authorization": "Basic ???"},
                 {"authorization": "sécret".encode()}, {"authorization": "Basic dTp4"}, {"x-api-key": "x"}]
        for path in ("/v1/jobs", "/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing"):
            for headers in wrong:
                assert refused(client.get(path, headers=headers), 401)["type"] == "authentication_error"
        for headers in (key, basic, {"xi-api-key": "sécret".encode()}, {"x-api-key": "sécret".encode()}):
            assert client.get("/v1/jobs", headers=headers).status_code == 200
        assert refused(client.post("/v1/jobs", json=SHORT), 401)


def test_pages_of_other_sites_reach_nothing(pipe):
    local = ("localhost", "127.0.0.1", "::1")
    with serving(pipe, hosts=local, origins=("https://good.example",)) as client:
        host = f"127.0.0.1:{client.base_url.port}"
        assert refused(client.get("/v1/jobs", headers={"host": "evil.example"}), 403)["code"] == "host"
        for origin in ("https://evil.example", "null", "https://127.0.0.1:1"):
            assert refused(client.post("/v1/jobs", json=SHORT, headers={"origin": origin}), 403)["code"] == "origin"
        for origin in (f"http://{host}", "https://good.example"):
            assert client.post("/v1/jobs", json=SHORT, headers={"origin": origin}).status_code == 202
        answer = client.get("/v1/jobs", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        answer = client.get("/v1/jobs", headers={"origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_without_cors_nothing_is_allowed(client):
    asked = {"origin": "https://x.example", "access-control-request-method": "POST"}
    answer = client.options("/v1/jobs", headers=asked)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
