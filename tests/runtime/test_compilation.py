"""torch.compile of the UNet's step: equal to the plain one at all lengths, and what it asks for."""

import shutil

import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2 import loading
from ldm2.runtime import compilation
from tests.helpers import condition, draw, our_unet

TWO_LEVELS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": [[None, 24]] * 2,
    "layers_per_block": 1,
}
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, ON_CUDA])]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_compiled_step_predicts_the_same_at_any_length_and_is_compiled_once(device):
    plain, compiled = (our_unet(checkpoints.unet(**TWO_LEVELS)).to(device) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compilation.compile_step(compiled)
    compiled = compilation.stepper(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    conditioning = plain.prepare(condition(plain.config, 2).to(device))
    for frames in (20, 28, 44):
        x_t, time = draw(1, 4, frames, 8, seed=frames).to(device), plain.embed_time(500)
        expected = plain(x_t, 500, conditioning, time)
        difference = compiled(x_t, 500, conditioning, time) - expected
        assert difference.norm() <= 2e-4 * expected.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_load_compiles_the_step_if_asked(tiny_checkpoint, monkeypatch):
    compiled = []
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(loading, "compile_step", compiled.append)
    ldm2.load(tiny_checkpoint)
    assert compiled == []
    pipe = ldm2.load(tiny_checkpoint, device="cpu", compile=True)
    assert compiled == [pipe.unet]


def test_compiling_needs_a_compiler(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        ldm2.load(tiny_checkpoint, device="cpu", compile=True)


def test_compiling_for_cuda_needs_triton(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        compilation.check_compiler(torch.device("cuda"))
