"""The worker of a batch: it keeps one model and turns rows into sound files, with a line for each in its manifest.

One class for every way to run it: in this process, in several, in a server, in the actors of a cluster.
"""

from __future__ import annotations

import functools
import json
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import ldm2
from ldm2 import audio
from ldm2.batch.columns import records_in, rows_in
from ldm2.batch.maker import Maker
from ldm2.batch.manifest import ERROR, OK
from ldm2.batch.remote import opened
from ldm2.batch.rows import LONGEST_REASON, Row, Rules, origin_of
from ldm2.fields import one_line
from ldm2.result import Result, output_of

Record = dict[str, Any]


class Worker(Maker):
    """Rows -> sound files below a folder. Everything that it is built of is a string, a number, or a table of such.

    model, load: as of `ldm2.load`
    out:         the folder of the job, or an address of fsspec (s3://bucket/folder)
    name:        of this worker in it, which no other has; "": one that is drawn
    format:      of the files, without the point; form: how they are written, as of ldm2.settings.Output
    batch:       rows that run together at most; 0 finds a size. A row has the same sound in any company, up to rounding
    threads:     of PyTorch; 0 leaves them as they are
    defaults:    options for rows that do not give them; allow_extra: see `Rules`

    A row that fails is a record with status "error" and one line of why. OSError is raised where nothing can be
    written: that is no row's fault.
    """

    def __init__(
        self, model: str, out: str, *, name: str = "0", format: str = "flac", batch: int = 0, threads: int = 0,
        load: Mapping[str, Any] | None = None, form: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None, allow_extra: bool = False,
    ):
        if threads:
            torch.set_num_threads(threads)
        self.place, self.format, self.form = opened(out), format, dict(form or {})
        output_of(self.form)
        self.place.make()
        self.log = self.place.log(f"manifest-{name or secrets.token_hex(8)}")
        super().__init__(ldm2.load(model, **(load or {})), batch)
        self.rules = Rules(origin_of(model, load or {}), dict(defaults or {}), allow_extra)

    def __call__(self, columns: Any) -> Any:
        """A table of rows by its columns -> a table of their records.

        Both are mappings of names to sequences, where None or NaN stands for what is missing, or tables of Arrow.
        """
        return records_in(self.run(rows_in(columns, self.rules)), columns, self.rules)

    def close(self) -> None:
        """Close the manifest, so that another worker may have its name."""
        self.log.close()

    def run(self, rows: Sequence[Row], done: Callable[[Record], object] = lambda record: None) -> list[Record]:
        """Make the rows -> their records, in this order. done: called with each when its file is in place.

        Raises Cancelled, and OSError where nothing can be written; what was made before is kept.
        """
        records: dict[int, Record] = {}
        with _Writer(functools.partial(self._write, done)) as writer:
            for row in rows:
                if row.error is not None:
                    writer.put(row, ValueError(row.error), 0)
            for group in self.groups([row for row in rows if row.error is None]):
                for row, made, spent in self.made(*group):
                    writer.put(row, made, spent)
            records = writer.finish()
        self.log.flush()
        return [records[id(row)] for row in rows]

    def _write(self, done: Callable[[Record], object], row: Row, made: Result | Exception, spent: float) -> Record:
        """Write the file of a row, then its line. Raises OSError if that cannot be done."""
        record = {"id": row.id, "path": None, "status": ERROR, "error": None, "seed": row.options.get("seed"),
                  "seconds": None, "sample_rate": None, "score": None, "ms": round(spent, 1), "bytes": None,
                  "line": row.line, "asked": row.asked, "prompt": row.options.get("prompt")}
        if isinstance(made, Exception):
            record["error"] = row.error or f"line {row.line}: {one_line(made, LONGEST_REASON)}"
        else:
            try:
                record |= self._saved(row, made)
            except ValueError as error:                    # of the sound: silence that has no loudness, for one
                record["error"] = f"line {row.line}: {one_line(error, LONGEST_REASON)}"
        record |= {name: value for name, value in _plain(row.extra).items() if name not in record}
        self.log.add(json.dumps(record).encode() + b"\n")
        done(record)
        return record

    def _saved(self, row: Row, made: Result) -> Record:
        """Write the file of a row -> what its record says of it. Raises ValueError if the sound cannot be written."""
        name = f"{row.path}.{self.format}"
        with self.place.sound(name) as path:
            made[0].save(path, overwrite=True, **self.form)
            about, size = audio.describe(path), path.stat().st_size
        return {"path": name, "status": OK, "seed": made.seeds[0],
                "seconds": round(about.num_samples / about.sample_rate, 6), "sample_rate": about.sample_rate,
                "bytes": size, "score": None if made.scores is None else made.scores[0]}


class _Writer:
    """A thread that writes what is put while the caller goes on. An error of writing is raised by the next call."""

    def __init__(self, write: Callable[[Row, Any, float], Record]):
        self._write = write
        self._records: dict[int, Record] = {}
        self._error: Exception | None = None
        self._queue: queue.Queue = queue.Queue(maxsize=32)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def put(self, *item: Any) -> None:
        """Have a row written."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def finish(self) -> dict[int, Record]:
        """Wait for the last row -> the records, by the identities of their rows."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._records

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._records[id(item[0])] = self._write(*item)
                except Exception as error:                 # told by the next call
                    self._error = error


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Columns to carry through as JSON has them."""
    return json.loads(json.dumps(extra, default=str), parse_constant=lambda word: None)
