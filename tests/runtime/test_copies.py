"""Copies of a pipeline: in memory with weights of their own, pickled by what they were loaded from."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.checkpoints import random_models
from ldm2.compat import AudioLDM2Pipeline
from ldm2.runtime import compilation
from ldm2.runtime.compilation import compile_step, is_compiled
from tests import authors

SETTINGS = {"steps": 2, "seconds": 0.3, "seed": 4}


def sound(pipe) -> np.ndarray:
    return pipe.generate("rain", **SETTINGS).waveforms


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deep_copy_has_weights_of_its_own(tiny_checkpoint, compiled):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    if compiled:
        compile_step(pipe.unet)
    with torch.compiler.set_stance("force_eager"):         # compiling takes long
        before, other = sound(pipe), copy.deepcopy(pipe)
        assert is_compiled(other.unet) is compiled
        np.testing.assert_allclose(sound(other), before, rtol=0, atol=1e-5)       # it lies elsewhere in memory
        with torch.no_grad():
            for parameter in other.unet.conv_out.parameters():
                parameter.add_(0.5)
        assert np.array_equal(sound(pipe), before)
        assert not np.allclose(sound(other), before, atol=1e-3)


def test_a_copy_shares_the_weights(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    assert copy.copy(pipe).unet is pipe.unet


def test_compiling_leaves_the_module_as_it_is(tiny_checkpoint):
    unet = ldm2.load(tiny_checkpoint, device="cpu").unet
    names = set(vars(unet))
    compile_step(unet)
    assert set(vars(unet)) == names
    assert isinstance(compilation.stepper(unet), compilation.CompiledUNet)
    assert compilation.stepper(copy.deepcopy(unet)) is not unet
    assert not is_compiled(copy.deepcopy(unet))


@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"dtype": "bfloat16", "reference": "diffusers"}])
def test_a_pickle_opens_as_the_same_pipeline(tiny_checkpoint, how):
    pipe = ldm2.load(tiny_checkpoint, device="cpu", **how)
    pickled = pickle.dumps(pipe)
    assert len(pickled) < 2000                             # not the weights
    other = pickle.loads(pickled)
    assert (other.device, other.dtype, other.low_memory) == (pipe.device, pipe.dtype, pipe.low_memory)
    assert np.array_equal(sound(other), sound(pipe))


def test_a_pickle_opens_from_any_folder(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent)
    pickled = pickle.dumps(ldm2.load(f"./{tiny_checkpoint.name}", device="cpu"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickled).unet is not None


def test_an_authors_file_is_pickled_with_its_tokenizers(tmp_path):
    file = authors.save(authors.whole_state(authors.modules("sound")), tmp_path / "file.pth")
    pipe = ldm2.load(file, device="cpu", tokenizers=authors.save_tokenizers(tmp_path / "tokenizers"))
    assert np.array_equal(sound(pickle.loads(pickle.dumps(pipe))), sound(pipe))


def test_the_drop_in_class_is_pickled_with_its_scheduler(tiny_checkpoint):
    pipe = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint, local_files_only=True)
    pipe.scheduler = checkpoints.diffusers_pipeline(tiny_checkpoint).scheduler

    def audio(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("rain", audio_length_in_s=0.3, num_inference_steps=2, generator=generator).audios

    other = pickle.loads(pickle.dumps(pipe))
    assert np.array_equal(audio(other), audio(pipe))


def test_compiled_comes_back_compiled(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/g++")
    pipe = ldm2.load(tiny_checkpoint, device="cpu", compile=True)
    assert is_compiled(pickle.loads(pickle.dumps(pipe)).unet)


def test_a_token_is_not_pickled(tiny_checkpoint):
    assert b"hf_secret" not in pickle.dumps(ldm2.load(tiny_checkpoint, device="cpu", token="hf_secret"))


def test_a_pipeline_without_origin_cannot_be_pickled():
    with pytest.raises(TypeError, match=r"ldm2\.load did not make"):
        pickle.dumps(random_models.pipeline("tiny", device=torch.device("cpu")))


@pytest.mark.slow
def test_another_process_takes_a_pipeline(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.testing.assert_close(pool.apply(sound, (pipe,)), sound(pipe), atol=1e-4, rtol=0)
