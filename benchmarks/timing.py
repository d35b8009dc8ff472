"""Variants of one thing, run alternately in one process."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ldm2.runtime import profiling

Run = Callable[[], object]
Make = Callable[[], Run]


@dataclass(frozen=True)
class Row:
    """Something to measure: the same work by several variants, the one that the others are compared with last.

    variants: each is made when the row's turn comes, and what it holds goes with the row.
    flop: of one call on the plain path, 0 where it is not counted. warm: how many first rounds are thrown away.
    calls: how many make one measurement, where one is so short that waiting for the device would show.
    """

    subject: str
    name: str
    variants: Mapping[str, Make]
    flop: int = 0
    warm: int = 1
    calls: int = 1


@dataclass
class Timed:
    """One variant of a row: for each repetition the seconds of a call and the bytes that were added at most to what was
    there; and what failed."""

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


@contextmanager
def attempt(timed: Timed) -> Iterator[None]:
    """An exception inside is recorded in `timed` and printed to stderr, and the benchmark goes on."""
    try:
        yield
    except Exception as error:                             # compilers, drivers, other libraries: each has its own kinds
        traceback.print_exc()
        timed.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def measure(row: Row, device: torch.device, repeats: int, at_least: float = 0.0) -> list[Timed]:
    """Run the variants of a row one after the other, `repeats` times and until all took `at_least` seconds together.

    One that fails, be it while it is made, is left out and says why.
    """
    timed = {name: Timed(row.subject, row.name, name, row.flop) for name in row.variants}
    runs: dict[str, Run] = {}
    for name, make in row.variants.items():
        with attempt(timed[name]):
            runs[name] = make()
    rounds, spent = -row.warm, 0.0
    while rounds < repeats or (runs and spent < at_least):
        for name, run in list(runs.items()):
            with attempt(timed[name]):
                seconds, memory = _once(run, device, row.calls)
            if timed[name].error is not None:
                del runs[name]
            elif rounds >= 0:
                spent += row.calls * seconds
                timed[name].seconds.append(seconds)
                timed[name].memory += [] if memory is None else [memory]
        rounds += 1
    return list(timed.values())


def _once(run: Run, device: torch.device, calls: int) -> tuple[float, int | None]:
    """Seconds of each of `calls` calls, one after the other, and bytes of all."""
    spent: list[float] = []

    def work() -> None:
        for _ in range(calls):
            run()

    memory = profiling.memory_of(lambda: spent.append(profiling.seconds_of(work, device)), device)
    return spent[0] / calls, memory


def ratio(ours: Timed, theirs: Timed) -> float:
    """How many times faster `ours` is: the median over pairs of neighbours."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds))
