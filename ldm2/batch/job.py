"""A job: a table of rows, a folder for its sounds, and which of the rows are this process's. No torch here."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ldm2 import __version__
from ldm2.atomic import whole
from ldm2.batch import manifest, tables
from ldm2.batch.rows import Row, Rules

_OURS = (".lock-", ".ldm2-")


@dataclass(frozen=True)
class Job:
    """What a batch is. source, folder: the table and where the sounds go. shard: (i, n), the i-th of n parts, from 1.

    format, form: of the files. model, load: as of `ldm2.load`. defaults, allow_extra: see `Rules`.
    retry: whether rows that failed are tried again. batch: rows that run together, 0 for as many as fit.
    """

    source: Path
    folder: Path
    model: str
    load: Mapping[str, Any]
    format: str = "flac"
    form: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allow_extra: bool = False
    shard: tuple[int, int] = (1, 1)
    retry: bool = False
    batch: int = 0

    @property
    def part(self) -> str:
        """The shard as it stands in file names."""
        return "{}of{}".format(*self.shard)

    def rows(self) -> Iterator[Row]:
        """The rows of all shards, each id once: a second row that asks for the same is left out."""
        origin = {"model": self.model, "revision": self.load.get("revision"),
                  "reference": self.load.get("reference", "authors")}
        rules = Rules(origin, self.defaults, self.allow_extra, words=self.source.suffix.lower() == ".csv")
        seen: dict[int, int] = {}
        try:
            for line, columns in tables.records(self.source):
                row = rules.row(line, columns)
                key, asked = manifest.key_of(row.id), int(row.asked[:16] or "0", 16)
                if key in seen:
                    if row.error is None and seen[key] == asked:
                        continue
                    other = f"line {line}: the id {row.id!r} stands in a line before, for something else"
                    row = Row(line, f"line-{line}", extra=row.extra, error=row.error or other)
                    key, asked = manifest.key_of(row.id), 0
                seen[key] = asked
                yield row
        except ValueError as error:
            known = str(error).startswith(str(self.source))
            raise ValueError(str(error) if known else f"{self.source}: {error}") from error

    def own(self) -> Iterator[Row]:
        """The rows of this shard."""
        number, count = self.shard
        return itertools.islice(self.rows(), number - 1, None, count)

    def fingerprint(self) -> dict[str, Any]:
        """All that changes results beside the rows themselves, and the versions."""
        from ldm2.runtime.device import choose_device, choose_dtype

        device = choose_device(self.load.get("device", "auto"))
        dtype = str(choose_dtype(self.load.get("dtype", "auto"), device))[6:]
        named = {name: self.load.get(name) for name in ("revision", "variant", "reference")}
        return {"model": self.model, **named, "dtype": dtype, "device": device.type, "format": self.format,
                "output": dict(self.form), "set": _jsonable(self.defaults), "ldm2": __version__,
                "torch": importlib.metadata.version("torch")}


@dataclass
class Survey:
    """What a table holds: rows of this shard, those that cannot be made, kinds of sound, and the place of each id."""

    order: dict[int, int]
    rows: int = 0
    errors: list[str] = field(default_factory=list)
    failed: int = 0
    groups: Counter = field(default_factory=Counter)
    through: Counter = field(default_factory=Counter)


def survey(job: Job, settled: Mapping[str, tuple[str, str]], errors: int = 20) -> Survey:
    """Read the whole table. errors: how many of them are kept. Raises ValueError for a table without rows."""
    number, count = job.shard
    found = Survey({})
    for place, row in enumerate(job.rows()):
        found.order[manifest.key_of(row.id)] = place
        if place % count != number - 1:
            continue
        found.rows += 1
        if row.error is not None:
            found.failed += 1
            if len(found.errors) < errors:
                found.errors.append(row.error)
        else:
            found.groups[kind(row)] += 1
        if is_through(job, row, settled):
            found.through[settled[row.id][0]] += 1
    if not found.order:
        raise ValueError(f"{job.source} holds no rows")
    return found


def kind(row: Row) -> tuple[str, ...]:
    """What decides over the time that a row takes, in words."""
    names = ("seconds", "steps", "sampler", "preset", "guidance_scale", "num_waveforms")
    return row.options["task"], *(f"{name} {row.options[name]}" for name in names if name in row.options)


def is_through(job: Job, row: Row, settled: Mapping[str, tuple[str, str]]) -> bool:
    """Whether nothing is left to do for a row: the same was asked for, and it succeeded (or failed, without retry)."""
    status, asked = settled.get(row.id, (None, ""))
    return asked == row.asked and (status == manifest.OK or (status == manifest.ERROR and not job.retry))


def open_folder(job: Job, command: list[str]) -> BinaryIO:
    """Make the folder ready, and lock it for this shard: the file is to be held open.

    Raises ValueError for a folder of another job, one that holds something else, and one that is in use.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    about = job.folder / "job.json"
    others = [name for name in os.listdir(job.folder) if not name.startswith(_OURS)]
    if others and not about.exists():
        raise ValueError(f"{job.folder} holds other files, such as {min(others)}: choose a new folder")
    now = job.fingerprint()
    if not about.exists():
        with suppress(FileExistsError), whole(about) as temporary:
            temporary.write_text(json.dumps({"fingerprint": now, "command": command}, indent=1), encoding="utf-8")
    try:
        then = json.loads(about.read_text(encoding="utf-8"))["fingerprint"]
        other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{about} is not a job of ldm2 batch: choose a new folder") from None
    if other:
        told = ", ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in other)
        raise ValueError(f"{job.folder} belongs to another job: {told}; choose a new folder")
    path = job.folder / f".lock-{job.part}"
    file = open(path, "a+b")                               # noqa: SIM115  (held by the caller)
    manifest.lock(file.fileno(), path)
    return file


@contextmanager
def from_stdin(job: Job, stream: BinaryIO) -> Iterator[Job]:
    """The job with what stands on a stream as its table: JSON lines, or prompts if the first line is no object."""
    first = stream.readline(tables.LONGEST_LINE)
    suffix = ".jsonl" if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else ".txt"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"stdin{suffix}"
        with open(copy, "wb") as file:
            file.write(first)
            for block in iter(lambda: stream.read(1 << 20), b""):
                file.write(block)
        yield replace(job, source=copy)


def finish(job: Job, order: Mapping[int, int]) -> None:
    """Write the merged manifests: manifest.jsonl, and manifest.parquet where pyarrow is installed."""
    manifest.merge(job.folder, order)
    with suppress(ImportError):
        _write_parquet(job.folder)


def _write_parquet(folder: Path) -> None:
    """manifest.jsonl as Parquet; columns of mixed types as text. Raises ImportError without pyarrow."""
    parquet = tables.pyarrow_parquet()
    import pyarrow

    with open(folder / "manifest.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):
            columns[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    with whole(folder / "manifest.parquet", overwrite=True) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def _jsonable(values: Mapping[str, Any]) -> Any:
    """Values as they come back from JSON."""
    return json.loads(json.dumps(dict(values)))
