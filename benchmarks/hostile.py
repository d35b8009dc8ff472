"""Requests that nobody should send to a server, each made with random numbers: method, path, the rest."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import soundfile

Request = tuple[str, str, dict[str, Any]]

OPTIONS = ("prompt", "steps", "seconds", "seed", "guidance_scale", "sampler", "loop", "num_waveforms", "prompt_at",
           "window", "normalize", "guidance_interval", "kind", "format", "sample_rate", "cache_interval")
WRONG: tuple[Any, ...] = ({}, [[]], "\ud800", -1e308, 10**400, "../../etc/passwd", "x" * 70_000, [None] * 3, {"a": {}},
                          -5.5, "NaN", "\0", "'; DROP TABLE jobs; --")
KINDS = ("transfer", "inpaint", "extend", "variations", "super_resolution")


def wave(draw: random.Random) -> bytes:
    """A WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.full(1600, draw.random()), 16_000, format="WAV")
    return file.getvalue()


def body(draw: random.Random) -> Request:
    """A wrong value of an option."""
    name, value = draw.choice(OPTIONS), draw.choice(WRONG)
    if (name == "prompt" and isinstance(value, str)) or (name == "guidance_scale" and isinstance(value, float)):
        value = ["a", "b"]                                 # others would do
    path = draw.choice(("/v1/jobs", "/v1/audio/generate"))
    return "POST", path, {"content": json.dumps({"prompt": "x", "steps": 2, "seconds": 0.3, name: value}).encode()}


def not_json(draw: random.Random) -> Request:
    """A body that is no object of JSON."""
    text = draw.choice((b"{", b"[1, 2", b"NaN", b'{"seconds": Infinity}', b"\xff" * 50, b"[" * 90_000, b"null", b'"x"',
                        draw.randbytes(300)))
    return "POST", draw.choice(("/v1/jobs", "/v1/audio/generate", "/v1/sound-generation")), {"content": text}


def unknown(draw: random.Random) -> Request:
    """A field that is none."""
    name = draw.choice(("stepz", "lora_path", "file", "__class__", "callback", "progress", "latents", "url", "\ud8ff"))
    text = json.dumps({"prompt": "x", "steps": 2, name: draw.choice(("/etc/passwd", 1))}).encode()
    return "POST", "/v1/jobs", {"content": text}


def form(draw: random.Random) -> Request:
    """A form that is broken, or whose sound is."""
    sound = wave(draw)
    cut = draw.choice((sound[:30], sound[:-700], draw.randbytes(2000), b"", b"RIFF" + draw.randbytes(90), b"OggS" * 20,
                       b"fLaC" + draw.randbytes(500), b"ID3" + draw.randbytes(500)))
    name = draw.choice(("../../../etc/passwd", "a.wav", "x" * 300, "\\\\server\\share", "..", "lock"))
    return "POST", "/v1/jobs", {"data": {"kind": draw.choice(KINDS), "prompt": "x", "above": "3000"},
                                "files": {draw.choice(("audio", "audio", "file")): (name, cut)}}


def torn(draw: random.Random) -> Request:
    """A form that does not end, or never begins."""
    begun = b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\nhi'
    text = draw.choice((b"", b"--x\r\n", begun,
                        b"--y--\r\n", draw.randbytes(500), b"--x\r\n" + b"a: b\r\n" * 500))
    kind = draw.choice(("multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="))
    return "POST", "/v1/jobs", {"content": text, "headers": {"content-type": kind}}


def large(draw: random.Random) -> Request:
    """A body of 100 MB."""
    kind = draw.choice(("application/json", "multipart/form-data; boundary=x"))
    return "POST", "/v1/jobs", {"content": bytes(100_000_000), "headers": {"content-type": kind}}


def key(draw: random.Random) -> Request:
    """A key that is wrong."""
    wrong = draw.choice(("Bearer", "Bearer kez", "Bearer key2", "Basic !!", "Basic a2V5", "key", "Digest key"))
    return "POST", "/v1/jobs", {"json": {"prompt": "x"}, "headers": {"authorization": wrong}}


def address(draw: random.Random) -> Request:
    """An address that leads nowhere."""
    return draw.choice((
        ("GET", "/v1/jobs/../../etc/passwd", {}), ("GET", "/v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd/content", {}),
        ("GET", "/v1/jobs/lock", {}), ("DELETE", "/v1/jobs/%00", {}), ("GET", "/v1/jobs/x/content?n=-1", {}),
        ("PATCH", "/v1/jobs", {}), ("GET", "/" + "x" * 7000, {}), ("POST", "/health", {"content": b"x"}),
        ("GET", "/v1/jobs", {"headers": {"host": "evil.example"}}),
        ("POST", "/v1/sound-generation?output_format=exe", {"json": {"text": "x"}}),
        ("POST", "/v1/jobs", {"json": {"prompt": "x"}, "headers": {"origin": "https://evil.example"}})))


REQUESTS: tuple[Callable[[random.Random], Request], ...] = (
    *(body, unknown, not_json, form, torn, key, address) * 4, large)
