"""A job: a table of rows, a folder for its sounds, and which of the rows are this process's. No torch here."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ldm2 import __version__
from ldm2.batch import manifest, tables
from ldm2.batch.local import Folder, Lock
from ldm2.batch.remote import Lease, Remote, opened
from ldm2.batch.rows import Kind, Row, Rules, nameless, origin_of

LEFT, TWICE = 1, 2


@dataclass(frozen=True)
class Job:
    """What a batch is. source, out: the table, and where the sounds go. shard: (i, n), the i-th of n parts, from 1.

    format, form: of the files. model, load: as of `ldm2.load`. defaults, allow_extra: see `Rules`.
    retry: whether rows that failed are tried again. batch: rows that run together, 0 for as many as fit. elsewhere: the
    kind of device of workers on other machines. called: the table in messages, where that is not its path.
    """

    source: Path
    out: str
    model: str
    load: Mapping[str, Any]
    format: str = "flac"
    form: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allow_extra: bool = False
    shard: tuple[int, int] = (1, 1)
    retry: bool = False
    batch: int = 0
    elsewhere: str = ""
    called: str = ""

    @property
    def table(self) -> str:
        """What the table is called in messages."""
        return self.called or str(self.source)

    @functools.cached_property
    def place(self) -> Folder | Remote:
        """Where the files go."""
        return opened(self.out)

    @property
    def part(self) -> str:
        """The shard as it stands in file names."""
        return "{}of{}".format(*self.shard)

    def rows(self, order: dict[int, int]) -> Iterator[Row]:
        """The rows of all shards, each id once: a second row that asks for the same is left out.

        order: is filled with the place of each id, by its key.
        """
        asked = array("Q")                                 # at each place; dictionaries of a million texts are large
        rules = self._rules()
        for line, columns in self._records():
            row = rules.row(line, columns)
            key, what = row.key, int(row.asked[:16] or "0", 16)
            if key in order:
                if row.error is None and asked[order[key]] == what:
                    continue
                row = _twice(row)
                key, what = row.key, 0
            order[key] = len(asked)
            asked.append(what)
            yield row

    def some(self, found: Survey) -> Iterator[Row]:
        """The rows that a survey found to be left."""
        rules, lines = self._rules(), found.left
        for line, columns in self._records(lambda number: number < len(lines) and lines[number]):
            row = rules.row(line, columns)
            yield _twice(row) if lines[line] == TWICE else row

    def _rules(self) -> Rules:
        """How the rows are read."""
        words = self.source.suffix.lower() == ".csv"
        return Rules(origin_of(self.model, self.load), self.defaults, self.allow_extra, words)

    def _records(self, wanted: tables.Wanted = lambda number: True) -> Iterator[tables.Record]:
        """What stands in the table."""
        try:
            yield from tables.records(self.source, wanted)
        except ValueError as error:
            known = str(error).startswith(str(self.source))
            raise ValueError(str(error) if known else f"{self.table}: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        """All that changes results beside the rows themselves, and the versions."""
        import torch

        from ldm2.runtime.device import choose_device, chosen_name

        device = torch.device(self.elsewhere) if self.elsewhere else choose_device(self.load.get("device", "auto"))
        dtype = chosen_name(self.load.get("dtype", "auto"), device)
        named = {name: self.load.get(name) for name in ("revision", "variant", "reference")}
        return {"model": self.model, **named, "dtype": dtype, "device": device.type, "format": self.format,
                "output": dict(self.form), "set": _jsonable(self.defaults), "ldm2": __version__,
                "torch": importlib.metadata.version("torch")}


@dataclass
class Survey:
    """What a table holds.

    order: the place of each id, by its key. rows: of this shard. failed, errors: those of them that cannot be made.
    groups: kinds of sound; waiting: of those that are to be made. through: how those ended for which nothing is to be
    done. left: by the line, what is to be done: nothing, LEFT, or TWICE for a row that cannot have the id that it asks
    for.
    """

    order: dict[int, int] = field(default_factory=dict)
    rows: int = 0
    errors: list[str] = field(default_factory=list)
    failed: int = 0
    groups: Counter[Kind] = field(default_factory=Counter)
    waiting: Counter[Kind] = field(default_factory=Counter)
    through: Counter = field(default_factory=Counter)
    left: bytearray = field(default_factory=bytearray)


def survey(job: Job, settled: Mapping[int, int], errors: int = 20) -> Survey:
    """Read the whole table. errors: how many of them are kept. Raises ValueError for a table without rows."""
    number, count = job.shard
    found = Survey()
    for place, row in enumerate(job.rows(found.order)):
        if place % count != number - 1:
            continue
        found.rows += 1
        if row.error is not None:
            found.failed += 1
            if len(found.errors) < errors:
                found.errors.append(row.error)
        else:
            found.groups[row.kind] += 1
        status = ended(job, row, settled)
        if status is not None:
            found.through[status] += 1
        else:
            if row.error is None:
                found.waiting[row.kind] += 1
            found.left.extend(bytes(row.line + 1 - len(found.left)))
            found.left[row.line] = TWICE if row.id == nameless(row.line) else LEFT
    if not found.order:
        raise ValueError(f"{job.table} holds no rows")
    return found


def ended(job: Job, row: Row, settled: Mapping[int, int]) -> str | None:
    """How a row ended for which nothing is left to do: the same was asked for, and it succeeded, or failed and is not
    to be tried again."""
    mark = settled.get(row.key)
    if mark is None:
        return None
    status = manifest.status_of(mark)
    if mark != manifest.mark(status, row.asked) or (status == manifest.ERROR and job.retry):
        return None
    return status


def open_place(job: Job, command: list[str]) -> Lock | Lease:
    """Make the place of the files ready, and lock it for this shard until what is returned is closed.

    Raises ValueError for a folder of another job, one that holds something else, and one that is in use.
    """
    place = job.place
    place.make()
    names, now = place.names(), job.fingerprint()
    if names and "job.json" not in names:
        raise ValueError(f"{place} holds other files, such as {names[0]}: choose a new folder")
    lock = place.lock(f".lock-{job.part}")
    try:
        if not names:
            with suppress(FileExistsError), place.written("job.json") as temporary:
                temporary.write_text(json.dumps({"fingerprint": now, "command": command}, indent=1), encoding="utf-8")
        _check_same(place, now)
    except BaseException:
        lock.close()
        raise
    return lock


def _check_same(place: Folder | Remote, now: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder belongs to a job with another fingerprint."""
    about = place.where("job.json")
    try:
        with place.read(["job.json"]) as [path]:
            then = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{about} is not a job of ldm2 batch: choose a new folder") from None
    if other:
        told = ", ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in other)
        raise ValueError(f"{place} belongs to another job: {told}; choose a new folder")


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
        yield replace(job, source=copy, called="stdin")


def finish(job: Job, order: Mapping[int, int]) -> None:
    """Write the merged manifests: manifest.jsonl, and manifest.parquet where pyarrow is installed."""
    manifest.merge(job.place, order)
    with suppress(ImportError):
        _write_parquet(job.place)


def _write_parquet(place: Folder | Remote) -> None:
    """manifest.jsonl as Parquet; columns of mixed types as text. Raises ImportError without pyarrow."""
    parquet = tables.pyarrow_parquet()
    import pyarrow

    with place.read(["manifest.jsonl"]) as [path], open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
            columns[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    with place.written("manifest.parquet") as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def _twice(row: Row) -> Row:
    """A row whose id another has, and asks for something else."""
    why = f"line {row.line}: the id {row.id!r} stands in a line before, for something else"
    return Row(row.line, nameless(row.line), extra=row.extra, error=row.error or why)


def _jsonable(values: Mapping[str, Any]) -> Any:
    """Values as they come back from JSON."""
    return json.loads(json.dumps(dict(values)))
