"""Variants of one thing, run alternately in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ldm2 import profiling

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """Something to measure: the same work by several variants, the one that the others are compared with last.

    flop: of one run on the plain path, 0 where it is not counted. warm: how many first rounds are thrown away.
    prepare: makes the variants when the row's turn comes, and what they hold goes with them.
    """

    subject: str
    name: str
    prepare: Callable[[], Mapping[str, Run]]
    flop: int = 0
    warm: int = 1


@dataclass
class Timed:
    """One variant of a row: seconds and bytes (added at most to what was there) of each repetition, and what failed."""

    subject: str
    name: str
    variant: str
    flop: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def is_wide(self) -> bool:
        """Whether the repetitions differ by more than 15 %."""
        return max(self.seconds) > profiling.WIDE * min(self.seconds)


def measure(row: Row, device: torch.device, repeats: int, at_least: float = 0.0) -> list[Timed]:
    """Run the variants of a row one after the other, `repeats` times and until all took `at_least` seconds together.

    One that fails is left out and says why.
    """
    runs = dict(row.prepare())
    timed = {name: Timed(row.subject, row.name, name, row.flop) for name in runs}
    rounds, spent = -row.warm, 0.0
    while rounds < repeats or (runs and spent < at_least):
        for name, run in list(runs.items()):
            try:
                seconds, memory = _once(run, device)
            except RuntimeError as error:                  # no memory, no kernel, or no way to compile
                timed[name].error = " ".join(str(error).split())[:200]
                del runs[name]
                continue
            if rounds >= 0:
                spent += seconds
                timed[name].seconds.append(seconds)
                timed[name].memory += [] if memory is None else [memory]
        rounds += 1
    return list(timed.values())


def _once(run: Run, device: torch.device) -> tuple[float, int | None]:
    """Seconds and bytes of one call."""
    spent: list[float] = []
    memory = profiling.memory_of(lambda: spent.append(profiling.seconds_of(run, device)), device)
    return spent[0], memory


def ratio(ours: Timed, theirs: Timed) -> float:
    """How many times faster `ours` is: the median over pairs of neighbours."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds))
