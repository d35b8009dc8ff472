"""Which clips, crops, captions, time steps and noise a training step gets.

All of it hangs on the seed, the step and the row alone. So a step of eight rows is the same whether they come as one
batch, as two batches whose gradients are accumulated, or in two processes; and so is a step after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.training.encoding import Example, Examples, Store, conditioning
from ldm2.training.loop import generator_for
from ldm2.training.objective import spread_steps

_KEPT = 512                                # conditionings that stay in memory


@dataclass(frozen=True)
class Batch:
    """Rows of a training step: scaled latents and noise (B, C, T, F), time steps (B,), what they are conditioned on.

    kept: (B,) true where the model is to predict what it did before the training, whatever the noise is.
    texts: the keys of the conditionings of the rows.
    """

    x_0: Tensor
    eps: Tensor
    t: Tensor
    conditioning: Conditioning
    kept: Tensor
    texts: tuple[str, ...] = ()


class Rows(Protocol):
    """The rows that there are for each step, over all processes: rows first .. first + count - 1 of it as a batch."""

    rows: int

    def take(self, step: int, first: int, count: int) -> Any: ...


class Batches:
    """Draws the rows of each step from encoded clips.

    rows: of a whole step, over all processes. frames: latent frames of a crop. scaling: of the latents. total: time
    steps of the schedule. drop: share of the rows without a caption. own: examples that the model made itself, and the
    share of the rows that come from them; these are kept, and so is then what has no caption.
    """

    def __init__(
        self, examples: Sequence[Example], nothing: str, store: Store, *, rows: int, frames: int, scaling: float,
        total: int, drop: float, seed: int, own: tuple[Sequence[Example], float] = ((), 0.0),
    ):
        self.examples, self.nothing, self.store, self.rows, self.frames = examples, nothing, store, rows, frames
        self.own, self.own_share = own if own[0] else ((), 0.0)
        self.scaling, self.total, self.drop, self.seed = scaling, total, drop, seed
        self._conditioning = lru_cache(_KEPT)(lambda key: conditioning(store, key))

    def steps(self, step: int) -> Tensor:
        """The time steps of all rows of a training step."""
        return spread_steps(self.rows, self.total, generator_for(self.seed, step))

    def take(self, step: int, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1 of a training step."""
        parts = [self._row(step, row) for row in range(first, first + count)]
        x_0, eps, texts, kept = (list(column) for column in zip(*parts))
        return Batch(torch.stack(x_0), torch.stack(eps), self.steps(step)[first : first + count],
                     Conditioning.join([self._conditioning(key) for key in texts]), torch.tensor(kept), tuple(texts))

    def _row(self, step: int, row: int) -> tuple[Tensor, Tensor, str, bool]:
        """Latents (C, T, F), noise of that shape, and key of the conditioning of one row, and whether it is kept."""
        generator = generator_for(generator_for(self.seed, step).initial_seed(), 1 + row)
        example, own = self._example(step, row, generator)
        kept = self.store.get(example.latents)
        spare = kept["mean"].shape[1] - self.frames
        at = int(torch.randint(spare + 1, (), generator=generator))
        mean, logvar = (kept[name][:, at : at + self.frames] for name in ("mean", "logvar"))
        chosen = int(torch.randint(len(example.conditions), (), generator=generator))
        dropped = bool(torch.rand((), generator=generator) < self.drop)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        key = self.nothing if dropped else example.conditions[chosen]
        eps = torch.randn(mean.shape, generator=generator)
        return self.scaling * latents, eps, key, own or (dropped and bool(self.own))

    def _example(self, step: int, row: int, generator: torch.Generator) -> tuple[Example, bool]:
        """One of the clips, each of them once before any comes again; or one of the model's own sounds, and true."""
        if self.own and torch.rand((), generator=generator) < self.own_share:
            return self.own[int(torch.randint(len(self.own), (), generator=generator))], True
        epoch, place = divmod(step * self.rows + row, len(self.examples))
        order = torch.randperm(len(self.examples), generator=generator_for(self.seed + 1, epoch))
        return self.examples[int(order[place])], False


def split(examples: Examples, held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Clips to train on, and a share that is kept aside: at least one if the share is not 0."""
    count = 0 if held_out == 0 else max(1, round(held_out * len(examples.all)))
    order = torch.randperm(len(examples.all), generator=generator_for(seed + 2, 0)).tolist()
    aside = set(order[:count])
    return ([each for i, each in enumerate(examples.all) if i not in aside],
            [each for i, each in enumerate(examples.all) if i in aside])
