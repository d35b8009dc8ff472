"""The OpenAPI document: every request that it describes is made from its schemas, every answer is what it says."""

from __future__ import annotations

import io

import pytest

from ldm2 import audio
from ldm2.settings import RESULTS
from tests.helpers import tone

jsonschema = pytest.importorskip("jsonschema")

BASE = {"prompt": "a low hum", "steps": 2, "seconds": 0.4}
# Values that the schema allows and the others do not: what only holds beside something else.
BESIDE = {"eta": {"sampler": "ddim"}, "overlap": {"window": 0.4, "overlap": 0.1}, "window": {"window": 0.3},
          "prompt_at": {"prompt_at": [[0.2, "wind"]]}, "sample_rate": {"sample_rate": 8000}, "model": {"model": "tiny"},
          "transcription": None, "phonemes": None, "lora": {"lora": []}, "subtype": {"format": "wav"}}


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    audio.write(path, tone(0.4), 16_000)
    return path.read_bytes()


def example(schema):
    """A value that a schema allows."""
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        one = schema.get("prefixItems") or [schema["items"]] * schema.get("minItems", 1)
        return [example(each) for each in one]
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 0.5)
    return {"string": "x", "boolean": True, "number": low, "integer": int(low) + ("minimum" not in schema)}[kind]


def operations(document):
    """path, method and description of each request."""
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            yield path, method, about


def checked(document, about, answer):
    """The answer is one that is described, in its shape."""
    assert str(answer.status_code) in about["responses"], (answer.status_code, answer.text)
    for kind, content in about["responses"][str(answer.status_code)].get("content", {}).items():
        if kind == "application/json" and content.get("schema"):
            jsonschema.validate(answer.json(), content["schema"] | {"components": document["components"]})
    return answer


def test_every_request_without_a_body_is_answered_as_described(client, document):
    job = client.done(client.ask(**BASE))
    asked = []
    for path, method, about in sorted(operations(document), key=lambda operation: operation[1] == "delete"):
        if "requestBody" not in about:
            answer = checked(document, about, client.request(method, path.replace("{id}", job["id"])))
            assert answer.status_code == 200
            if "{id}" in path:
                assert checked(document, about, client.request(method, path.replace("{id}", "none"))).status_code == 404
            asked.append((method, path))
    assert len(asked) == 10


def test_every_request_with_a_body_is_answered_as_described(client, document, sound):
    asked, made = [], client.post("/v1/audio/generate", json=BASE).content
    for path, method, about in operations(document):
        for kind in about.get("requestBody", {}).get("content", {}):
            if path == "/v1/settings":
                answer = client.post(path, files={"file": ("made.wav", io.BytesIO(made))})
            elif kind == "multipart/form-data":
                answer = client.post(path, data={"kind": "transfer", "prompt": "x", "steps": "2"},
                                     files={"audio": ("sound.wav", io.BytesIO(sound))})
            else:
                needed = about["requestBody"]["content"][kind]["schema"].get("required")
                answer = client.request(method, path, json={needed[0]: "a low hum"} if needed else BASE)
            assert checked(document, about, answer).status_code in ((404,) if path.endswith("speech") else (200, 202))
            assert checked(document, about, client.request(method, path, content=b"{")).status_code in (400, 404)
            asked.append((method, path, kind))
    assert len(asked) == 6


def test_every_option_of_the_document_is_taken_as_its_schema_says(client, document, sound):
    content = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    taken = []
    for name, schema in content["application/json"]["schema"]["properties"].items():
        value = BESIDE.get(name, {name: example(schema)} | {"sampler": "euler"} if name == "preset" else {
            name: example(schema)})
        for kind in (kind for kind in RESULTS if value is not None):
            body = {"kind": kind, "steps": 2, "prompt": "x"} | value
            body |= {"above": 3000} if kind == "super_resolution" and "above" not in body else {}
            body |= {"times": [[0.1, 0.2]]} if kind == "inpaint" and not {"times", "bands"} & set(body) else {}
            words = {key: str(word) if not isinstance(word, list) else str(word).replace("'", '"')
                     for key, word in body.items()}
            answer = client.post("/v1/jobs", json=body | {"seconds": 0.4}) if kind == "generate" else client.post(
                "/v1/jobs", data=words, files={"audio": ("sound.wav", sound)})
            if answer.status_code == 202:
                client.delete(answer.json()["url"])
                taken.append(name)
                break
            assert "takes no" in answer.json()["error"]["message"], (name, answer.text)
    every = set(content["application/json"]["schema"]["properties"]) - {"transcription", "phonemes"}
    assert set(taken) == every


@pytest.mark.parametrize("wrong", ["x", -1, 1.5, [], {}, True])
def test_what_a_schema_of_capabilities_does_not_allow_is_refused(client, wrong):
    for option in client.get("/v1/capabilities").json()["options"]:
        schema = option["schema"]
        if "generate" not in option["kinds"] or jsonschema.Draft202012Validator(schema).is_valid(wrong):
            continue
        answer = client.post("/v1/jobs", json=BASE | {option["name"]: wrong})
        close = option["name"] == "seed" or (schema.get("type") == "boolean" and wrong in (0, 1))
        assert answer.status_code == 400 or close, (option["name"], wrong, answer.text)


def test_capabilities_tell_limits_and_defaults_of_this_server(client, pipe):
    told = client.get("/v1/capabilities").json()
    options = {option["name"]: option for option in told["options"]}
    assert options["steps"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000}
    assert options["steps"]["default"] == pipe.defaults.get("steps", 200)
    assert options["seconds"]["unit"] == "seconds" and options["seconds"]["defaults"]["extend"] == 10.0
    assert options["num_waveforms"]["schema"]["maximum"] == told["limits"]["max_waveforms"] == 16
    assert options["num_waveforms"]["defaults"] | {"variations": 3} == options["num_waveforms"]["defaults"]
    assert options["strength"]["kinds"] == ["transfer", "variations"] and options["paste"]["default"] is True
    assert options["normalize"]["group"] == "output" and "LUFS" in options["normalize"]["help"]
    assert client.get("/v1/models").json()["data"][0] == told["model"]


def test_the_page_for_people_needs_no_other_host(client, document):
    text = client.get("/docs").text
    assert all(path in text for path in document["paths"]) and "negative_prompt" in text
    assert "<script" not in text and "http://" not in text and "https://" not in text
