"""How many processes with how many threads make most of a CPU: found by measuring, on the rows of the job themselves.

More threads for one row pay for large models, more processes for small ones; what pays on a machine is not guessed. The
job begins with one process that has all threads. Then twice as many processes with half the threads each are tried, as
long as that is faster, there is memory for them, and enough is left to do. Nothing that is measured is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ldm2.batch.measured import work
from ldm2.runtime.machine import memory

PORTION = 8                                # rows that a process is handed at once, while measuring
PORTIONS = 2                               # that are measured of each process, after one that is not
WORTH = 60.0                               # seconds that must be left for another plan to be tried


@dataclass(frozen=True)
class Plan:
    """So many processes with so many threads each."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} x {self.threads}"


@dataclass
class _Speed:
    """What the processes of a plan have done."""

    portions: dict[int, int] = field(default_factory=dict)                   # by the process
    rows: int = 0
    work: float = 0.0
    ms: float = 0.0


class Tuner:
    """Chooses a plan for a CPU of so many cores. told: is called with a line when it is decided."""

    def __init__(self, cores: int, told: Callable[[str], object]):
        self.plan = Plan(1, cores)
        self.coming: Plan | None = None                    # waits for its processes to be ready
        self.settled = False
        self._told = told
        self._now = _Speed()
        self._found: dict[Plan, tuple[float, float]] = {}  # work and rows a minute

    def made(self, member: int, kind: tuple, ms: float) -> None:
        """A row of this kind took so many ms in a process."""
        if self._now.portions.get(member, 0):
            self._now.rows += 1
            self._now.work += work(kind)
            self._now.ms += ms

    def finished(self, member: int, left: int, pid: int) -> None:
        """A process has finished a portion; left: rows that are."""
        if self.settled or self.coming is not None:
            return
        portions = self._now.portions
        portions[member] = portions.get(member, 0) + 1
        if len(portions) == self.plan.workers and min(portions.values()) > PORTIONS and self._now.ms:
            self._decide(left, pid)

    def ready(self) -> None:
        """The processes of the plan that was to come are there."""
        self.plan, self.coming, self._now = self.coming or self.plan, None, _Speed()

    def _decide(self, left: int, pid: int) -> None:
        """Try another plan, or settle for the fastest."""
        plan, now = self.plan, self._now
        minutes = now.ms / 6e4 / plan.workers
        self._found[plan] = now.work / minutes, now.rows / minutes
        best = max(self._found, key=self._found.__getitem__)
        more = Plan(2 * plan.workers, plan.threads // 2)
        worth = more.threads and 60 * left / self._found[plan][1] > WORTH
        if best == plan and worth and room_for(plan.workers, pid):
            self.coming = more
            return
        self.settled, self.plan = True, best
        if len(self._found) > 1:
            rates = ", ".join(f"{each}: {rows:.0f}" for each, (_, rows) in self._found.items())
            self._told(f"processes x threads, rows a minute: {rates}; {best} it is")


def room_for(number: int, pid: int) -> bool:
    """Whether there is memory for so many processes like one; where that cannot be told, there is not."""
    try:
        return 1.3 * number * memory("VmHWM", pid) < memory("MemAvailable")
    except (OSError, StopIteration, ValueError):
        return False
