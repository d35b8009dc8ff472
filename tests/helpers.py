"""What tests of several modules share: random tensors and sounds, distances, diffusers' weights in our modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import checkpoints
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig, VAEConfig
from ldm2.unet import UNet
from ldm2.vae import VAE

ROOT = Path(__file__).parents[1]
PACKAGES = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"         # PYTHONPATH of processes, which shall have the same kernels
PROMPT = "a dog barking in the rain"

# scheduler/scheduler_config.json of cvssp/audioldm2.
PUBLISHED = checkpoints.SCHEDULER | {"_diffusers_version": "0.20.0.dev0"}

FILM = {
    "class_embed_type": "simple_projection",
    "class_embeddings_concat": True,
    "projection_class_embeddings_input_dim": 20,
}
# Kinds of UNets, as arguments of benchmarks.checkpoints.unet.
UNETS = {
    "base": {},
    "large": {"cross_attention_dim": [[None, 24, 32, None]] * 3, "transformer_layers_per_block": 2},
    "speech": {"cross_attention_dim": [[None, 24]] * 3},
    "one context, no self-attention": {"cross_attention_dim": 24},
    "48 kHz": {"cross_attention_dim": [[None, None]] * 3} | FILM,
    "four levels, heads listed": {
        "block_out_channels": (32, 64, 96, 160),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        "cross_attention_dim": [[None, 24, 32]] * 4,
        "attention_head_dim": (4, 8, 12, 20),
    },
    "sizes that differ between levels": {
        "layers_per_block": (2, 1, 2),
        "transformer_layers_per_block": (1, 2, 1),
        "cross_attention_dim": [[None], [None, 24, 32], [None, 24]],
    },
    "attention at all levels": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, drawn in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise(*shape: int, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """White noise with a standard deviation of `level`, within -1 and 1, float32."""
    return (level * np.random.default_rng(seed).standard_normal(shape)).clip(-1, 1).astype(np.float32)


def tone(seconds: float, sample_rate: int = 16_000, hz: float = 440.0, level: float = 0.5) -> np.ndarray:
    """A sine with `level` as its largest value, float32."""
    phase = 2 * np.pi * hz * np.arange(round(seconds * sample_rate)) / sample_rate
    return (level * np.sin(phase)).astype(np.float32)


def relative(a, b) -> float:
    """Largest difference over the largest value of b."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """The largest difference is at most `tolerance`, or that share of the largest value where this is above 1."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def our_unet(theirs, **changes) -> UNet:
    """Our UNet with the weights of diffusers' module, loaded as from a file: no initialisation, strictly."""
    fields = dict(theirs.config) | {"_class_name": type(theirs).__name__} | changes
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(fields, reference="diffusers"))
    unet.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return unet.eval()


def our_vae(theirs) -> VAE:
    """Our VAE with the weights of diffusers' module."""
    with torch.device("meta"):
        vae = VAE(VAEConfig.from_dict(dict(theirs.config)))
    vae.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return vae.eval()


def condition(config: UNetConfig, rows: int, seed: int = 1) -> Conditioning:
    """Random contexts of 8 and 5 tokens; the last two tokens of the last context are masked in row 0."""
    contexts = tuple(draw(rows, 8 - 3 * i, width, seed=seed + i) for i, width in enumerate(config.context_widths))
    mask = torch.ones(rows, 5)
    mask[0, 3:] = 0
    masks = (None, mask)[: len(contexts)]
    film = None if config.film_dim is None else draw(rows, config.film_dim, seed=seed + 9)
    return Conditioning(contexts, masks, film)


class Tape:
    """Stands for a CUDA graph on any device: replaying calls the function again, on the tensors of the recording."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        results = run()

        @torch.inference_mode()                            # which may write to tensors made in any mode
        def replay():
            for result, new in zip(results, run()):
                result.copy_(new)

        return replay, results


def run_ldm2(*arguments, cwd: Path, **keywords) -> subprocess.CompletedProcess:
    """Runs `python -m ldm2 ARGUMENTS` in the folder `cwd`."""
    environment = os.environ | {"PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm2", *map(str, arguments)]
    keywords = {"text": True, "timeout": 120} | keywords
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, **keywords)
