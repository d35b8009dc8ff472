"""What rows took on this machine, kept from job to job in a small file of the user's cache: for estimates.

A row of a kind that has been made takes what it took. Of another kind it takes as much more as it has more work: a step
of the UNet for a second of sound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm2.atomic import whole
from ldm2.batch.rows import OPTIONS, Kind, Row, canonical
from ldm2.runtime import machine
from ldm2.settings import PRESETS

MOST = 200                                 # kinds that are kept of a model
Record = dict[str, Any]


def work(kind: Kind) -> float:
    """Steps of the UNet for a second of sound that a row takes; what it does not say is taken for the usual."""
    told = dict(kind)
    told = PRESETS.get(told.get("preset"), {}) | told
    names = ("steps", "seconds", "guidance_scale")
    steps, seconds, guidance = (told.get(name, OPTIONS[name].default) for name in names)
    return float(steps * seconds * told.get("num_waveforms", 1) * (2 if guidance > 1 else 1))


class Tally:
    """Notes what rows take: rows pass it on their way to the workers, and their records on the way back."""

    def __init__(self, done: Callable[[Record], object]):
        self._done = done
        self._kinds: dict[str, Kind] = {}
        self.taken: dict[Kind, list[float]] = {}           # rows, ms and bytes

    def passing(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows."""
        for row in rows:
            self._kinds[row.id] = row.kind
            yield row

    def __call__(self, record: Record) -> None:
        """Take a record."""
        kind = self._kinds.pop(record["id"], None)
        if kind and record.get("bytes"):
            taken = self.taken.setdefault(kind, [0, 0.0, 0])
            for place, value in enumerate((1, record["ms"], record["bytes"])):
                taken[place] += value
        self._done(record)


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of rows. workers: that were at work when it was measured. kinds: rows of kinds that were."""

    seconds: float
    bytes: float
    workers: int
    known: int


def keep(model: str, load: Mapping[str, Any], workers: int, taken: Mapping[Kind, list[float]]) -> None:
    """Keep what the rows of a job took; model, load: as of `ldm2.load`. Without a place to write there is none."""
    if not taken:
        return
    path = _path()
    with suppress(OSError):
        every, name = _read(path), _name(model, load)
        kinds = every.pop(name, {}).get("kinds", {}) if isinstance(every.get(name), dict) else {}
        kinds = {key: each for key, each in kinds.items() if key not in map(canonical, taken)}
        kinds |= {canonical(kind): each for kind, each in taken.items()}
        every[name] = {"workers": workers, "kinds": dict(list(kinds.items())[-MOST:])}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(every, indent=1), encoding="utf-8")


def estimate(model: str, load: Mapping[str, Any], left: Mapping[Kind, int]) -> Estimate | None:
    """What so many rows of each kind will take, in one process; None where nothing has been measured."""
    try:
        told = _read(_path())[_name(model, load)]
        taken = {tuple(map(tuple, json.loads(key))): each for key, each in told["kinds"].items()}
        spent, made, size, seconds = (sum(values) for values in zip(
            *((ms, work(kind) * rows, size, dict(kind).get("seconds", 10) * rows)
              for kind, (rows, ms, size) in taken.items())))
        total = [0.0, 0.0]
        for kind, count in left.items():
            rows, ms, each = taken.get(kind) or (1, spent / made * work(kind),
                                                 size / seconds * dict(kind).get("seconds", 10))
            total = [total[0] + count * ms / rows, total[1] + count * each / rows]
        known = sum(count for kind, count in left.items() if kind in taken)
        return Estimate(total[0] / 1e3, total[1], int(told["workers"]), known)
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
        return None


def _path() -> Path:
    """Where it is kept."""
    return machine.cache_folder() / "measured.json"


def _read(path: Path) -> dict[str, Any]:
    """What is kept."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _name(model: str, load: Mapping[str, Any]) -> str:
    """A machine and a model on it."""
    parts = [machine.cpu()["name"], machine.cores(), model, *(load.get(name, "auto") for name in ("device", "dtype"))]
    return " | ".join(map(str, parts))
