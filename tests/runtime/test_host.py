"""What the host program has set changes no result and breaks no call: torch's defaults, numpy's, warnings, streams."""

from __future__ import annotations

import contextlib
import functools
import io
import locale
import logging
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2 import mel
from ldm2.checkpoints.convert import convert
from ldm2.compat import AudioLDM2Pipeline
from ldm2.edit import metrics
from tests import authors

RATE = 16_000
FAST = {"steps": 2, "seed": 3}


@contextlib.contextmanager
def changed(change, value, before):
    """change(value), and change(before) at the end."""
    change(value)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def no_streams(replacement):
    with contextlib.redirect_stdout(replacement), contextlib.redirect_stderr(replacement):
        yield


@contextlib.contextmanager
def debug_logging():
    root = logging.getLogger()
    level, stream = root.level, io.StringIO()
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def folder_that_is_gone(tmp_path):
    before, gone = os.getcwd(), tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    try:
        yield
    finally:
        os.chdir(before)


HOSTS = {
    "float64": lambda tmp: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda tmp: changed(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda tmp: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "device": lambda tmp: torch.device("meta"),
    "inference_mode": lambda tmp: torch.inference_mode(),
    "no_grad": lambda tmp: torch.no_grad(),
    "autocast": lambda tmp: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda tmp: changed(torch.use_deterministic_algorithms, True, False),
    "anomalies": lambda tmp: torch.autograd.set_detect_anomaly(True),
    "numpy": lambda tmp: np.errstate(all="raise"),
    "warnings": lambda tmp: warnings_are_errors(),
    "logging": lambda tmp: debug_logging(),
    "recursion": lambda tmp: changed(sys.setrecursionlimit, 250, sys.getrecursionlimit()),
    "no_stdout": lambda tmp: no_streams(None),
    "closed_stdout": lambda tmp: no_streams(_closed()),
    "locale": lambda tmp: changed(set_locale, "C", locale.setlocale(locale.LC_ALL)),
    "folder": folder_that_is_gone,
}


# All of them, a few at a time: none of these hides what another one of its company does.
COMPANIES = (
    ("float64", "inference_mode", "numpy", "locale"), ("float16", "no_grad", "logging", "closed_stdout"),
    ("bfloat16", "autocast", "warnings", "recursion"), ("device", "anomalies", "deterministic", "no_stdout", "folder"),
)

# How the processor computes is the host's to choose: the last bits are another's, not the sound.
ARITHMETIC = {
    "denormals": lambda: changed(torch.set_flush_denormal, True, False),
    "threads": lambda: changed(torch.set_num_threads, 2, 1),
    "precision": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
}


def set_locale(name: str) -> None:
    locale.setlocale(locale.LC_ALL, name)


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class Calls:
    """Every kind of call, each as a list of arrays or bytes."""

    def __init__(self, folder: Path, speech: Path, file: Path, tokenizers: Path):
        self.folder, self.speech, self.file, self.tokenizers = folder, speech, file, tokenizers
        time = np.arange(RATE // 2) / RATE
        # With numbers that float32 holds only as subnormal ones, or not at all.
        self.sound = 0.3 * np.sin(2 * np.pi * 440 * time) * np.where(time > 0.4, 1e-44, 1.0)
        self.pipe = ldm2.load(folder, device="cpu")
        self.voice = ldm2.load(speech, device="cpu")

    def load(self, tmp):
        return [value for part in _modules(ldm2.load(self.folder, device="cpu")) for value in part]

    def low_memory(self, tmp):
        return _sound(ldm2.load(self.folder, device="cpu", low_memory=True).generate("rain", seconds=0.3, **FAST))

    def generate(self, tmp):
        settings = {"seconds": 1.5, "window": 1.0, "prompt_at": [(0.7, "wind")], "num_waveforms": 2, "progress": True}
        return _sound(self.pipe.generate("rain", "noise", sampler="dpmpp-2m-sde", **settings, **FAST))

    def samplers(self, tmp):
        return [value for sampler in ("ddim", "pndm", "lms", "euler-ancestral", "heun", "unipc") for value in
                _sound(self.pipe.generate("rain", seconds=0.3, loop=True, sampler=sampler, cache_interval=2, **FAST))]

    def speak(self, tmp):
        return _sound(self.voice.generate("a voice", transcription="hello", seconds=0.3, **FAST))

    def inpaint(self, tmp):
        ranges = {"times": [(0.1, 0.2)], "bands": [(500, 3000)], "soft_seconds": 0.05}
        return _sound(self.pipe.inpaint(self.sound, "rain", sample_rate=RATE, **ranges, **FAST))

    def transfer(self, tmp):
        both = np.stack([self.sound, -self.sound])
        return _sound(self.pipe.transfer(both, "rain", sample_rate=22_050, keep_format=True, num_waveforms=2, **FAST))

    def extend(self, tmp):
        return _sound(self.pipe.extend(self.sound, "rain", sample_rate=RATE, seconds=0.3, **FAST))

    def super_resolution(self, tmp):
        return _sound(self.pipe.super_resolution(self.sound, above=3000, sample_rate=RATE, **FAST))

    def reconstruct(self, tmp):
        made = [self.pipe.reconstruct(self.sound, stage, sample_rate=RATE) for stage in ("vocoder", "vae")]
        return [value for each in made for value in (each.waveform, *map(np.float64, each.distances.values()))]

    def encode_audio(self, tmp):
        return [self.pipe.encode_audio(self.sound, RATE, seed=1)]

    def drop_in(self, tmp):
        pipe = AudioLDM2Pipeline.from_pretrained(self.folder, local_files_only=True)
        generator = torch.Generator("cpu").manual_seed(0)
        return [pipe("rain", audio_length_in_s=0.3, num_inference_steps=2, generator=generator).audios]

    def log_mel(self, tmp):
        sound = torch.linspace(-1, 1, 4000, dtype=torch.float32, device="cpu")[None]
        return [mel.log_mel(sound), mel.mel_filter_bank(mel.MEL_48KHZ)]

    def metrics(self, tmp):
        distances = metrics.compare(self.sound, self.sound[::-1].copy(), mel.MEL_16KHZ)
        return [np.float64(value) for value in distances.values()]

    def convert(self, tmp):
        convert(self.file, tmp / "converted", "float16", tokenizers=self.tokenizers)
        return [path.read_bytes() for path in sorted((tmp / "converted").rglob("*.safetensors"))]

    def original(self, tmp):
        pipe = ldm2.load(self.file, device="cpu", tokenizers=self.tokenizers, dtype="bfloat16")
        return _sound(pipe.generate("rain", seconds=0.3, num_waveforms=2, **FAST))

    def files(self, tmp):
        result = self.pipe.transfer(self.sound, "rain", sample_rate=RATE, strength=0, **FAST)
        paths = [result.save(tmp / f"sound.{suffix}")[0] for suffix in ("wav", "flac", "ogg", "mp3")]
        return [value for path in paths for value in _sound(self.pipe.transfer(path, "rain", **FAST))]


CALLS = [name for name in vars(Calls) if not name.startswith("_")]


def _sound(result) -> list:
    return [result.waveforms, result.latents, result.mel, *map(np.float64, result.scores or [])]


def _modules(pipe) -> list:
    return [[*part.state_dict().values(), *part.buffers()] for part in (pipe.unet, pipe.vae, pipe.vocoder, pipe.text)]


def bits(value) -> object:
    """What two values must share to be the same to the bit."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, torch.Tensor):
        assert not value.is_meta
        return str(value.dtype), tuple(value.shape), value.detach().float().numpy().tobytes()
    return str(value.dtype), value.shape, value.tobytes()


@pytest.fixture(scope="module")
def calls(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    file = authors.save(authors.whole_state(authors.modules("sound")), folder / "file.pth")
    speech = checkpoints.save_speech(folder / "speech")
    return Calls(tiny_checkpoint, speech, file, authors.save_tokenizers(folder / "tokenizers"))


def generators():
    """The states of all that the host may draw from."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def expected(calls, tmp_path_factory):
    """Of each call what it gives without any setting, and whether the host's generators were left alone; made once."""

    @functools.cache
    def of(name):
        before = generators()
        made = [bits(value) for value in getattr(calls, name)(tmp_path_factory.mktemp("expected"))]
        return made, generators() == before

    return of


def test_each_setting_is_tried():
    assert sorted(host for company in COMPANIES for host in company) == sorted(HOSTS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("company", COMPANIES, ids=lambda company: company[0])
def test_a_setting_of_the_host_changes_nothing(calls, expected, tmp_path, company, name):
    alone, _ = expected(name)
    with contextlib.ExitStack() as stack:
        for host in company:
            stack.enter_context(HOSTS[host](tmp_path))
        got = getattr(calls, name)(tmp_path)
    assert [bits(value) for value in got] == alone


@pytest.mark.parametrize("host", ARITHMETIC)
def test_arithmetic_is_the_hosts_to_choose(calls, tmp_path, host):
    alone = calls.inpaint(tmp_path)
    with ARITHMETIC[host]():
        got = calls.inpaint(tmp_path)
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CALLS)
def test_generators_of_the_host_are_left_alone(expected, name):
    assert expected(name)[1]
