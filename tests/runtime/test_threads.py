"""One pipeline in several threads: each gets, to the bit, what it would get alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.conditioning import Conditioning

THREADS = 8
TEXT = "a dog barking in the rain while somebody far away plays an old violin and the wind takes the last leaves"
PROMPTS = [f"{TEXT[: 5 + 13 * i % len(TEXT)]} {i}" for i in range(16)]
LONG = "rain " * 300                                       # is cut, unlike the others


@pytest.fixture(autouse=True)
def eager_threads():
    """Threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module", params=[False, True], ids=["default", "low_memory"])
def pipe(request, tiny_checkpoint):
    return ldm2.load(tiny_checkpoint, device="cpu", low_memory=request.param)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return ldm2.load(checkpoints.save_speech(tmp_path_factory.mktemp("speech")), device="cpu")


def in_threads(function, jobs):
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, jobs))


def equal(one: Conditioning, other: Conditioning) -> bool:
    pairs = [*zip(one.contexts, other.contexts, strict=True), *zip(one.masks, other.masks, strict=True)]
    return all(torch.equal(a, b) if b is not None else a is None for a, b in pairs)


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_conditionings_are_those_of_one_thread(tiny_checkpoint, reference):
    pipe = ldm2.load(tiny_checkpoint, device="cpu", reference=reference)
    jobs = [[prompt] for prompt in PROMPTS] + [PROMPTS[i : i + 3] for i in range(0, 12, 3)] + [[LONG]] * 2

    def sides(prompts):
        conditioning = pipe.encode(prompts)
        return conditioning, pipe.encode_unconditional(conditioning, prompts[0][:20])

    expected = [sides(job) for job in jobs]
    for got, alone in zip(in_threads(sides, jobs * 2), expected * 2, strict=True):
        assert equal(got[0], alone[0])
        assert equal(got[1], alone[1])


def test_what_is_said_is_that_of_one_thread(speaker):
    jobs = [(f"a voice {i}", "abc def"[: 1 + i % 7] or "a") for i in range(16)]
    expected = [speaker.encode(prompt, transcription=words) for prompt, words in jobs]
    got = in_threads(lambda job: speaker.encode(job[0], transcription=job[1]), jobs)
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_whole_sounds_with_their_ranks_are_those_of_one_thread(pipe):
    jobs = list(enumerate(PROMPTS[:8]))

    def sound(job):
        seed, prompt = job
        settings = {"steps": 2, "seconds": 0.3 + 0.1 * (seed % 3), "seed": seed, "num_waveforms": 1 + seed % 2}
        return pipe.generate(prompt, prompt[:10], cache_interval=1 + seed % 2, **settings)

    threads = in_threads(sound, jobs)                      # first, so that they race for the ranker
    for got, alone in zip(threads, map(sound, jobs), strict=True):
        assert torch.equal(torch.from_numpy(got.waveforms), torch.from_numpy(alone.waveforms))
        assert torch.equal(got.latents, alone.latents)
        assert (got.seeds, got.scores) == (alone.seeds, alone.scores)


def test_edits_are_those_of_one_thread(pipe):
    rng = torch.Generator().manual_seed(0)
    sounds = [0.1 * torch.randn(4000 + 640 * i, generator=rng) for i in range(6)]

    def edit(sound):
        return pipe.inpaint(sound, "rain", times=[(0.1, 0.2)], sample_rate=16000, steps=2, seed=3).waveforms

    for got, alone in zip(in_threads(edit, sounds), map(edit, sounds), strict=True):
        assert torch.equal(torch.from_numpy(got), torch.from_numpy(alone))


def test_threads_that_ask_for_one_model_get_one(tiny_checkpoint, monkeypatch):
    loaded, load = [], ldm2.loading.load
    monkeypatch.setattr(ldm2.loading, "load", lambda *args, **named: loaded.append(args) or load(*args, **named))
    ldm2.loading._loaded.cache_clear()
    settings = {"model": str(tiny_checkpoint), "steps": 1, "seconds": 0.1}
    in_threads(lambda seed: ldm2.generate("rain", seed=seed, **settings), range(4))
    assert len(loaded) == 1
