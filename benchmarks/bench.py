"""What is compared: our pipeline, diffusers' one, and what the rows of a comparison share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.flop import Flop
from benchmarks.timing import Make
from ldm2.pipeline import AudioLDM2


@dataclass(frozen=True)
class Bench:
    """What all rows share. make_theirs: loads diffusers' pipeline, None to do without. folder: the checkpoint of both.

    steps: of the generation; sweep_steps: of those of several lengths and batches.
    """

    ours: AudioLDM2
    make_theirs: Callable[[], Any] | None
    folder: Path | None
    seconds: float
    steps: int
    sweep_steps: int
    their_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @functools.cached_property
    def flop(self) -> Flop:
        return Flop(self.ours)

    @functools.cached_property
    def theirs(self) -> Any:
        """diffusers' pipeline, loaded when a variant first needs it: if that fails, it is a failure of that variant."""
        return self.make_theirs()

    @functools.cached_property
    def theirs_compiled(self) -> Any:
        """diffusers' pipeline with a compiled UNet, and all else shared."""
        pipe = copy.copy(self.theirs)
        pipe.unet = torch.compile(self.theirs.unet)
        return pipe

    def beside(self, ours: dict[str, Make], theirs: Make) -> dict[str, Make]:
        """Our variants and, where it is there, diffusers, which they are compared with."""
        return ours if self.make_theirs is None else ours | {"diffusers": theirs}
