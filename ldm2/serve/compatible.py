"""Requests as clients of other servers send them: a sound while the client waits. One that goes away cancels its job.

Shapes: vLLM-Omni's audio generation, ElevenLabs' sound generation, OpenAI's speech.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from ldm2.options import check_flag, check_number, check_text
from ldm2.serve import schemas
from ldm2.serve.api import Api, Served, client_of, errors, made
from ldm2.serve.asked import FORMATS, asked, read_json
from ldm2.serve.errors import Refused, invalid
from ldm2.serve.jobs import Job
from ldm2.settings import GENERATE

router = APIRouter(prefix="/v1", tags=["while you wait"])

PCM = "pcm"                                # samples of 16 bits alone, little-endian, after a WAV file's header
VLLM = {"input": "prompt", "audio_length": "seconds", "num_inference_steps": "steps", "response_format": "format"}
INFLUENCE = 0.3                            # ElevenLabs' prompt_influence that is the model's own guidance
VOICES = ("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer",
          "verse")                         # OpenAI's names, which describe nothing
SPEAKER = "A person speaks clearly"
AUDIO: dict[int | str, dict[str, Any]] = {200: {
    "content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {name: {"schema": {"type": "string"}, "description": about} for name, about in {
        "X-Job-Id": "the job's id", "X-Seed": "the seed of the sound", "X-Score": "of several candidates",
        "X-Settings": "all options as JSON, where they are not too long for a header"}.items()}}}


def body_of(schema: dict[str, Any]) -> dict[str, Any]:
    """What a route takes, for the document."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def properties(required: str, **kinds: Any) -> dict[str, Any]:
    """JSON Schema of a body."""
    return {"type": "object", "required": [required], "properties": {
        name: {"type": kind} if isinstance(kind, str) else kind for name, kind in kinds.items()}}


@router.post("/audio/generate", response_class=Response, responses=errors(404, 409, 413, 429) | AUDIO,
             openapi_extra=body_of(schemas.body((GENERATE,), {
                 "input": {"type": "string", "description": "the prompt, by another name"},
                 "audio_length": {"type": "number", "description": "seconds, by another name"},
                 "num_inference_steps": {"type": "integer", "description": "steps, by another name"},
                 "response_format": {"type": "string", "enum": [*FORMATS, PCM], "default": "wav"},
                 "audio_start": {"type": "number", "const": 0}, "speed": {"type": "number", "const": 1}})))
async def generate(request: Request, api: Served) -> Response:
    """A sound from a prompt: the body of vLLM-Omni, or options by their names. Of several candidates the best."""
    given = {name: value for name, value in read_json(await request.body()).items() if value is not None}
    _fixed(given, "speed", 1)
    _fixed(given, "audio_start", 0)
    for theirs, ours in VLLM.items():
        if theirs in given:
            if ours in given:
                raise invalid(f"{theirs} and {ours} are the same: give one", theirs)
            given[ours] = given.pop(theirs)
    if given.get("kind", given.get("task", GENERATE)) != GENERATE:
        raise invalid("kind must be generate here: edits are jobs, see POST /v1/jobs", "kind")
    return await _sound(request, api, given)


@router.post("/sound-generation", response_class=Response, responses=errors(413, 429, 409) | AUDIO,
             openapi_extra=body_of(properties(
                 "text", text="string", loop="boolean", model_id="string",
                 duration_seconds={"type": ["number", "null"], "minimum": 0.5, "maximum": 30},
                 prompt_influence={"type": ["number", "null"], "minimum": 0, "maximum": 1})))
async def sound_generation(
    request: Request, api: Served,
    output_format: Annotated[str, Query(description="mp3_44100_128, pcm_16000, opus_48000_64, wav_44100 ...")]
    = "mp3_44100_128",
) -> Response:
    """A sound from a text, as clients of ElevenLabs ask for it. The model's name and the bit rate are not looked at."""
    body = {name: value for name, value in read_json(await request.body()).items() if value is not None}
    _known(body, "text", "duration_seconds", "prompt_influence", "loop", "model_id")
    given: dict[str, Any] = _elevenlabs_format(output_format)
    try:
        given["prompt"] = check_text("text", body.get("text"))
        given["loop"] = check_flag("loop", body.get("loop", False))
        if "duration_seconds" in body:
            given["seconds"] = check_number("duration_seconds", body["duration_seconds"], 0.5, 30, unit="seconds")
        influence = check_number("prompt_influence", body.get("prompt_influence", INFLUENCE), 0, 1)
    except (ValueError, OverflowError) as error:
        raise invalid(error, str(error).split()[0]) from None
    own = float(api.about.defaults.get("guidance_scale") or 3.5)
    given["guidance_scale"] = 1 + (own - 1) * influence / INFLUENCE
    return await _sound(request, api, given)


@router.post("/audio/speech", response_class=Response, responses=errors(404, 413, 429, 409) | AUDIO,
             openapi_extra=body_of(properties(
                 "input", input="string", voice="string", instructions="string", model="string",
                 response_format={"type": "string", "enum": [*FORMATS, PCM], "default": "mp3"},
                 speed={"type": "number", "const": 1}, stream_format={"type": "string", "const": "audio"})))
async def speech(request: Request, api: Served) -> Response:
    """Speech of a text, as clients of OpenAI ask for it; `voice` or `instructions` describe who speaks, in words."""
    if not api.about.is_speech_model:
        raise Refused(404, f"the model {api.about.origin['model']!r} does not speak: serve one of the speech models",
                      "no_speech", "model")
    body = {name: value for name, value in read_json(await request.body()).items() if value is not None}
    _known(body, "input", "voice", "instructions", "model", "response_format", "speed", "stream_format")
    _fixed(body, "speed", 1)
    _fixed(body, "stream_format", "audio")
    voice = body.get("voice")
    described = isinstance(voice, str) and voice.strip() and voice not in VOICES
    prompt = body.get("instructions") or (voice if described else SPEAKER)
    given = {"prompt": prompt, "transcription": body.get("input"), "format": body.get("response_format", "mp3")}
    if given["transcription"] is None:
        raise invalid("input is needed: what to say", "input")
    return await _sound(request, api, given | ({"model": body["model"]} if "model" in body else {}))


async def _sound(request: Request, api: Api, given: dict[str, Any]) -> Response:
    """Make one sound while the client waits."""
    bare = given.get("format") == PCM
    if bare:
        given |= {"format": "wav", "subtype": "PCM_16"}
    api.jobs.check_room(client_of(request))
    request_of = await run_in_threadpool(asked, given, api.about, api.limits)
    answer = await made(request, api, Job(api.jobs.new_id(), request_of, client_of(request)))
    return _bare(answer) if bare else answer


def _bare(answer: Response) -> Response:
    """The samples of a WAV file alone."""
    import io

    import soundfile

    samples, rate = soundfile.read(io.BytesIO(bytes(answer.body)), dtype="int16")
    headers = {name: value for name, value in answer.headers.items() if name.startswith("x-")}
    return Response(samples.astype("<i2").tobytes(), media_type=f"audio/pcm;rate={rate}", headers=headers)


def _elevenlabs_format(word: str) -> dict[str, Any]:
    """"mp3_44100_128" -> how the file is written."""
    found = re.fullmatch(r"(mp3|pcm|opus|wav)_(\d{4,6})(_\d{1,4})?", word, flags=re.ASCII)
    if found is None:
        raise invalid(f"unknown output_format {word!r:.60}, choose mp3, pcm, opus or wav with a sample rate, for "
                      "example mp3_44100_128", "output_format")
    return {"format": found[1], "sample_rate": int(found[2])}


def _known(body: Mapping[str, Any], *names: str) -> None:
    """Refuse fields that are none."""
    for name in body:
        if name not in names:
            raise Refused(400, f"there is no field {name!r:.100}, only {', '.join(names)}", "unknown_option",
                          name[:100])


def _fixed(given: dict[str, Any], name: str, only: Any) -> None:
    """A field of others with one value that makes sense here."""
    value = given.pop(name, only)
    if value != only or isinstance(value, bool):
        raise invalid(f"{name} must be {only} here, got {value!r:.60}", name)
