"""Parts in memory only while they are at work, on the tiny checkpoint."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.runtime.graphs import tensors
from ldm2.runtime.memory import Stage, gigabytes, peak_bytes
from ldm2.settings import Sampling
from tests import authors
from tests.helpers import PROMPT, ROOT, run_ldm2

PARTS = ("text", "unet", "vae", "vocoder")
SOUND = np.sin(np.arange(4000) / 20).astype(np.float32)
SETTINGS = {"seconds": 0.2, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def usual(tiny_checkpoint):
    """ldm2 on the tiny checkpoint with everything in memory."""
    return ldm2.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def sparing(tiny_checkpoint):
    """ldm2 on the tiny checkpoint with low_memory."""
    return ldm2.load(tiny_checkpoint, low_memory=True)


def awake(pipe) -> list[str]:
    """The parts that hold weights, all of them; a part that holds some is a mistake."""
    holding = {name: {not p.is_meta for p in getattr(pipe, name).parameters()} for name in PARTS}
    assert all(len(answers) == 1 for answers in holding.values())
    return [name for name, answers in holding.items() if answers == {True}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_memory_makes_the_same_sound(tiny_checkpoint, dtype):
    makers = [ldm2.load(tiny_checkpoint, dtype=dtype, low_memory=low) for low in (False, True)]
    first, second = (pipe.generate(PROMPT, "low quality", **SETTINGS).waveforms for pipe in makers)
    assert np.array_equal(first, second)


def test_low_memory_ranks_as_usual_and_again(usual, sparing):
    first, *others = (pipe.generate(PROMPT, num_waveforms=2, **SETTINGS) for pipe in (usual, sparing, sparing))
    assert all(np.array_equal(first.waveforms, other.waveforms) for other in others)
    assert all(first.scores == other.scores for other in others)


def test_no_part_holds_weights_outside_of_its_stage(sparing):
    seen = []
    sparing.generate(PROMPT, callback=lambda *_: seen.append(awake(sparing)), **SETTINGS)
    assert seen == [["unet"]] * 2
    assert awake(sparing) == []


@pytest.mark.parametrize("name", PARTS)
def test_weights_are_freed_when_a_stage_ends(sparing, name):
    with sparing.stages[name]:
        assert awake(sparing) == [name]
        weights = [weakref.ref(parameter) for parameter in getattr(sparing, name).parameters()]
    assert weights and not any(reference() is not None for reference in weights)


@pytest.mark.parametrize("use", [
    lambda pipe: pipe.vocoder(torch.zeros(1, 8, 32)),
    lambda pipe: pipe.vae.decode(torch.zeros(1, *pipe.latent_shape(0.2))),
    lambda pipe: pipe.vae.encode(torch.zeros(1, 1, 8, 32)).mean,
    lambda pipe: next(tensors(pipe.unet.prepare(pipe.encode(PROMPT)))),
    lambda pipe: pipe.unet.embed_time(3),
])
def test_a_part_that_sleeps_is_not_used(sparing, usual, use):
    """PyTorch would take weights that are not there for some memory's contents."""
    with pytest.raises(RuntimeError, match=r"weights in memory only inside `with pipe.stages\['(unet|vae|voc.*)'\]:`"):
        use(sparing)
    with sparing.stages["unet"], sparing.stages["vae"], sparing.stages["vocoder"]:
        assert torch.equal(use(sparing), use(usual))


def test_an_operation_takes_no_weights_that_are_not_there(sparing):
    with pytest.raises(RuntimeError, match="the weights are not in memory"):
        sparing.vocoder.upsample(0, torch.zeros(1, sparing.vocoder.conv_pre.out_channels, 5))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_pipeline_can_be_copied(tiny_checkpoint, low_memory):
    pipe = ldm2.load(tiny_checkpoint, low_memory=low_memory)
    other = copy.deepcopy(pipe)
    sounds = [made.generate(PROMPT, num_waveforms=2, **SETTINGS).waveforms for made in (pipe, other, pipe)]
    assert all(np.allclose(sounds[0], sound, rtol=0, atol=1e-5) for sound in sounds[1:])
    assert other.unet is not pipe.unet and (awake(other) == []) is low_memory


def test_weights_are_freed_after_an_error(sparing):
    with pytest.raises(ValueError, match="conditioning"):
        sparing.denoise(sparing.encode(PROMPT), None, torch.zeros(3, *sparing.latent_shape(0.2)), Sampling(steps=1))
    assert awake(sparing) == []


def test_the_text_encoders_are_read_once_for_both_sides_of_guidance(sparing, monkeypatch):
    stage = sparing.stages["text"]
    times = []
    load = stage._load
    monkeypatch.setattr(stage, "_load", lambda device: times.append(device) or load(device))
    sparing.generate(PROMPT, "low quality", **SETTINGS)
    assert times == [torch.device("cpu")]


def test_the_ranking_branch_is_not_kept(tiny_checkpoint, monkeypatch):
    pipe = ldm2.load(tiny_checkpoint, low_memory=True)
    made = []
    make = pipe._make_ranker
    monkeypatch.setattr(pipe, "_make_ranker", lambda *where: made.append(make(*where)) or made[-1])
    pipe.generate(PROMPT, **SETTINGS)
    assert not made
    pipe.generate(PROMPT, num_waveforms=2, **SETTINGS)
    [ranker] = made
    branch = weakref.ref(next(ranker.audio.parameters()))
    made.clear()
    del ranker
    assert branch() is None


@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_low_memory_edits_as_usual(usual, sparing, prompt):
    made = [pipe.transfer(SOUND, prompt, sample_rate=16000, steps=2, seed=0) for pipe in (usual, sparing)]
    assert np.array_equal(made[0].waveforms, made[1].waveforms)


def test_low_memory_reconstructs_as_usual(usual, sparing):
    made = [pipe.reconstruct(SOUND, sample_rate=16000) for pipe in (usual, sparing)]
    assert np.array_equal(made[0].waveform, made[1].waveform)


def test_low_memory_reads_authors_files_as_usual(tmp_path):
    state = authors.whole_state(authors.modules("sound"))
    path = authors.save(state, tmp_path / "full.pth")
    tokenizers = authors.save_tokenizers(tmp_path / "tokenizers")
    first, second = (
        ldm2.load(path, tokenizers=tokenizers, low_memory=low).generate(PROMPT, **SETTINGS) for low in (False, True)
    )
    assert np.array_equal(first.waveforms, second.waveforms)


def test_low_memory_refuses_a_damaged_file_at_once(tmp_path):
    folder = checkpoints.save(tmp_path / "checkpoint")
    [file] = (folder / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=file.name):
        ldm2.load(folder, low_memory=True)


def test_a_stage_without_weights_of_its_own_logs_its_time_once(caplog):
    stage = Stage("text", torch.device("cpu"))
    with caplog.at_level(logging.INFO, "ldm2"), stage, stage:
        pass
    [line] = caplog.messages
    assert line.startswith("text: 0.0") and line.endswith("GB")


def test_the_peak_counts_what_is_gone():
    before = peak_bytes(torch.device("cpu"))
    size = before + 50_000_000
    torch.ones(size // 4)
    assert peak_bytes(torch.device("cpu")) > size


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    script = "import torch; from ldm2.runtime import memory; print(memory.peak_bytes(torch.device('cpu')))"
    size = 2 * int(subprocess.check_output([sys.executable, "-c", script], cwd=ROOT))
    held = torch.ones(size // 4)
    assert int(subprocess.check_output([sys.executable, "-c", script], cwd=ROOT)) < held.nbytes


def test_gigabytes_are_rounded():
    assert (gigabytes(1_234_567_890), gigabytes(None)) == ("1.23 GB", "not known")


def test_the_command_line_tells_time_and_memory_of_each_stage(tiny_checkpoint, tmp_path):
    done = run_ldm2("generate", PROMPT, "--model", tiny_checkpoint, "--steps", 1, "--seconds", 0.2, "--low-memory",
                    "-v", "-o", "x.wav", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "x.wav\n"
    for stage in PARTS:
        assert re.search(rf"^ldm2: {stage}: \d+\.\d\d s, peak memory \d+\.\d\d GB$", done.stderr, re.MULTILINE)
