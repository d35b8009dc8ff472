"""Noise as diffusers' pipelines draw it."""

from __future__ import annotations

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


class GeneratorNoise:
    """Noise in the model's dtype, from one generator for the batch or one for each row, where the generator lives."""

    def __init__(self, generator: Generators, rows: int, dtype: torch.dtype):
        each = generator if isinstance(generator, list) else [generator]
        if not all(one is None or isinstance(one, torch.Generator) for one in each):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} waveforms: give one, or one for each")
        self.generator, self.dtype = generator, dtype

    def draw(self, rows: int, *shape: int) -> Tensor:
        """(rows, *shape) in the model's dtype, where the generator lives."""
        if isinstance(self.generator, list):
            return torch.cat([self._draw(generator, 1, *shape) for generator in self.generator])
        return self._draw(self.generator, rows, *shape)

    def _draw(self, generator: torch.Generator | None, *shape: int) -> Tensor:
        device = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=device)

    def __call__(self, like: Tensor) -> Tensor:
        return self.draw(*like.shape).to(like)
