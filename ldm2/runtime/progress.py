"""What a long computation says while it works: `progress(stage, done, total)`, shown as one bar or as plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

# Called with the name of a stage, how many of its parts are done, and how many there are.
Progress = Callable[[str, int, int], object]

SECONDS_BEFORE_LINES = 2.0                 # a job that is done by then says nothing
SECONDS_BETWEEN_LINES = 10.0


def silent(stage: str, done: int, total: int) -> None:
    """Says nothing."""


@contextmanager
def shown(progress: bool | Progress, file: TextIO | None = None) -> Iterator[Progress]:
    """The function to report to inside the `with` block.

    True shows one bar for the whole job on `file` (stderr), or lines where that is no terminal. A function is called
    itself. Raises ValueError for anything else.
    """
    if progress is False or progress is None:
        yield silent
    elif progress is True:
        file = sys.stderr if file is None else file
        display = _display(None if file is None or file.closed else file)
        try:
            yield display
        finally:
            display.close()
    elif callable(progress):
        yield progress
    else:
        raise ValueError(f"progress must be True, False or a function, got {progress!r}")


def _display(file: TextIO | None) -> Bar | Lines:
    """A bar on a terminal, lines elsewhere."""
    return Bar(file) if file is not None and file.isatty() else Lines(file)


class Bar:
    """One bar that shows the stages one after the other, each with its steps and the time that is left."""

    def __init__(self, file: TextIO):
        from tqdm import tqdm

        self._bar = tqdm(file=file, leave=False, dynamic_ncols=True, bar_format="{desc}: {bar} {n_fmt}/{total_fmt} "
                         "[{elapsed}<{remaining}]", disable=False, delay=1e-9, total=1)
        self._stage: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._bar.reset(total)
            self._bar.set_description_str(stage, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class Lines:
    """A line where a stage begins, and one every few seconds with the time that is left, for logs."""

    def __init__(self, file: TextIO | None):
        self._file = file
        self._stage: str | None = None
        self._start = self._began = self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._said = stage, now, now
            if now - self._start > SECONDS_BEFORE_LINES:
                self._write(f"{stage} ...")
        elif done < total and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._began) / max(done, 1) * (total - done)
            self._write(f"{stage}: {done} of {total}, {left:.0f} s left")

    def close(self) -> None:
        """Nothing is left open."""

    def _write(self, text: str) -> None:
        if self._file is not None:
            print(f"ldm2: {text}", file=self._file, flush=True)
