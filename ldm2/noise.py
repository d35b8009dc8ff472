"""Reproducible Gaussian noise: one CPU generator for each waveform.

Noise is drawn in float32 on the CPU and then moved, so that a seed means the same on every device, in every dtype and
in every batch. For one waveform the draws are those of diffusers with `torch.Generator("cpu").manual_seed(seed)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Standard normal noise whose row i depends on seeds[i] and on how often noise was drawn, on nothing else."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self, *shape: int) -> Tensor:
        """(rows, *shape) float32 on the CPU."""
        rows = [torch.randn((1, *shape), generator=generator, dtype=torch.float32, device="cpu")
                for generator in self.generators]
        return torch.cat(rows)

    def __call__(self, like: Tensor) -> Tensor:
        """Noise of the shape (rows, ...), device and dtype of `like`."""
        noise = self.draw(*like.shape[1:])
        if like.is_cuda:                                   # only a copy from pinned memory does not wait for the GPU
            noise = noise.pin_memory()
        return noise.to(like, non_blocking=like.is_cuda)
