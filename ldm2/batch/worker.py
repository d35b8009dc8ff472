"""The worker of a batch: it keeps one model and turns rows into sound files, with a line for each in its manifest.

One class for every way to run it: in this process, in several, in a server, in the actors of a cluster.
"""

from __future__ import annotations

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ldm2
from ldm2 import audio
from ldm2.batch.manifest import ERROR, OK, Manifest
from ldm2.batch.rows import Row, Rules, canonical
from ldm2.call import Call
from ldm2.conditioning import Conditioning
from ldm2.result import Result, output_of
from ldm2.runtime.inference import inference
from ldm2.runtime.memory import out_of_memory
from ldm2.samplers import Cancelled
from ldm2.settings import GENERATE, PER_PROMPT, Settings

Record = dict[str, Any]

SECONDS_AT_ONCE = {"cpu": 40.0, "cuda": 640.0}             # of sound in one run, with batch=0
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}
_TEXTS = 1024                              # conditionings that are kept


class Worker:
    """Rows -> sound files below a folder. Everything that it is built of is a string, a number, or a table of such.

    model, load: as of `ldm2.load`
    out:         the folder of the job; name: of this worker in it, which no other has
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
        self.folder, self.format, self.batch, self.form = Path(out), format, batch, dict(form or {})
        output_of(self.form)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest = Manifest(self.folder / f"manifest-{name}.jsonl")
        self.pipe = ldm2.load(model, **(load or {}))
        origin = {part: self.pipe.origin[part] for part in ("model", "revision", "reference")}
        self.rules = Rules(origin, dict(defaults or {}), allow_extra)
        self.stopped: Callable[[], bool] = lambda: False   # asked after each step; True ends `run` with Cancelled
        self._fits: dict[str, int] = {}                    # by group: what has been found by running out of memory
        self._conditionings: dict[tuple, tuple[Conditioning, Conditioning | None]] = {}

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A table of rows by its columns -> a table of their records; what is missing is None or NaN."""
        names = list(columns)
        rows = [self.rules.row(number, _given(dict(zip(names, values))))
                for number, values in enumerate(zip(*columns.values()), 1)]
        records = self.run(rows)
        every = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in every}

    def close(self) -> None:
        """Unlock the manifest, so that another worker may have its name."""
        self.manifest.close()

    def run(self, rows: Sequence[Row], done: Callable[[Record], object] = lambda record: None) -> list[Record]:
        """Make the rows -> their records, in this order. done: called with each when its file is in place.

        Raises Cancelled, and OSError where nothing can be written; what was made before is kept.
        """
        records: dict[int, Record] = {}
        with _Writer(functools.partial(self._write, done)) as writer:
            for row in rows:
                if row.error is not None:
                    writer.put(row, row.error, 0)
            for group in self._groups([row for row in rows if row.error is None]):
                for row, made, spent in self._made(*group):
                    writer.put(row, made, spent)
            records = writer.finish()
        return [records[id(row)] for row in rows]

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
        """Rows that can run together, each group with a name."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            alone = row.options["task"] != GENERATE or {"prompt_at", "num_waveforms"} & set(row.options)
            shape = {name: value for name, value in row.options.items() if name not in (*PER_PROMPT, "seed")}
            texts = [name for name in PER_PROMPT if name in row.options]
            groups.setdefault(row.id if alone else canonical([shape, texts]), []).append(row)
        yield from groups.items()

    def _made(self, group: str, rows: list[Row]) -> Iterator[tuple[Row, Result | str, float]]:
        """Each row with its sound, or one line why there is none, and its share of the time in ms."""
        waiting = list(rows)
        size = min(self._size(rows[0]), self._fits.get(group, len(rows)))
        while waiting:
            taken, start = waiting[:size], time.perf_counter()
            try:
                results = self._results(taken)
            except Cancelled:
                raise
            except Exception as error:                     # whatever a row does must not end the job
                if len(taken) == 1:
                    yield taken[0], _line(error), 1e3 * (time.perf_counter() - start)
                    del waiting[:1]
                elif out_of_memory(error):
                    self._fits[group] = size = max(1, len(taken) // 2)
                    torch.cuda.empty_cache()
                else:                                      # one of them is to blame
                    for row in taken:
                        yield from self._made(row.id, [row])
                    del waiting[:size]
                continue
            spent = 1e3 * (time.perf_counter() - start) / len(taken)
            yield from ((row, result, spent) for row, result in zip(taken, results))
            del waiting[:size]

    def _size(self, row: Row) -> int:
        """How many rows like this one run together."""
        if self.batch:
            return self.batch
        kind = "cuda" if self.pipe.device.type == "cuda" else "cpu"
        seconds = Settings(**row.options).resolved(self.pipe.defaults, duration=float("inf")).seconds or 10.0
        return max(1, min(ROWS_AT_ONCE[kind], int(SECONDS_AT_ONCE[kind] / seconds)))

    def _results(self, rows: Sequence[Row]) -> list[Result]:
        """The sounds of rows that can run together; of several candidates of a row, the best."""
        options = dict(rows[0].options)
        task = options.pop("task")
        options["callback"] = lambda step, total, latents: not self.stopped()
        if task != GENERATE:
            return [getattr(self.pipe, task)(rows[0].input, **options)[0]]
        if "prompt_at" in options or "num_waveforms" in options:
            return [self.pipe.generate(**options)[0]]
        for name in (*PER_PROMPT, "seed"):
            if name in options:
                options[name] = [row.options[name] for row in rows]
        return list(self.pipe.run(Call.of(GENERATE, self.pipe.origin, **options), self._encoded))

    @inference
    def _encoded(self, settings: Settings) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance for prompts that are encoded each alone, and once."""
        texts = {name: settings.each(name) or [None] * len(settings.prompts) for name in PER_PROMPT}
        pairs = [self._encoded_alone(settings.guided, **dict(zip(texts, each))) for each in zip(*texts.values())]
        if len(pairs) == 1:
            return pairs[0]
        other = Conditioning.join([pair[1] for pair in pairs]) if settings.guided else None
        return Conditioning.join([pair[0] for pair in pairs]), other

    def _encoded_alone(
        self, guided: bool, prompt: str, negative_prompt: str | None, **speech: str | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance for one prompt."""
        key = (guided, prompt, negative_prompt, *speech.values())
        if key not in self._conditionings:
            if len(self._conditionings) >= _TEXTS:
                self._conditionings.pop(next(iter(self._conditionings)))
            one = self.pipe.encode([prompt], **speech)
            other = self.pipe.encode_unconditional(one, negative_prompt, **speech) if guided else None
            self._conditionings[key] = one, other
        return self._conditionings[key]

    def _write(self, done: Callable[[Record], object], row: Row, made: Result | str, spent: float) -> Record:
        """Write the file of a row, then its line. Raises OSError if that cannot be done."""
        record = {"id": row.id, "path": None, "status": ERROR, "error": None, "seed": row.options.get("seed"),
                  "seconds": None, "sample_rate": None, "score": None, "ms": round(spent, 1), "bytes": None,
                  "line": row.line, "asked": row.asked, "prompt": row.options.get("prompt")}
        if isinstance(made, str):
            record["error"] = made if made.startswith("line ") else f"line {row.line}: {made}"
        else:
            path = self.folder / f"{row.path}.{self.format}"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.save(path, overwrite=True, **self.form)
                about = audio.describe(path)
                record |= {"path": f"{row.path}.{self.format}", "status": OK, "seed": made.seeds[0],
                           "seconds": round(about.num_samples / about.sample_rate, 6),
                           "sample_rate": about.sample_rate, "bytes": path.stat().st_size,
                           "score": None if made.scores is None else made.scores[0]}
            except ValueError as error:                    # of the sound: silence that has no loudness, for one
                record["error"] = f"line {row.line}: {_line(error)}"
        record |= {name: value for name, value in _plain(row.extra).items() if name not in record}
        self.manifest.add(record)
        done(record)
        return record


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


def _given(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a row has, numpy's numbers as Python's."""
    plain = {name: value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
             for name, value in columns.items()}
    return {name: value for name, value in plain.items() if value is not None and value == value}


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Columns to carry through as JSON has them."""
    return json.loads(json.dumps(extra, default=str))


def _line(error: Exception) -> str:
    """An error in one line; what is not one of input or arithmetic with its kind."""
    text = " ".join(str(error).split())[:500]
    known = isinstance(error, (ValueError, OSError, ArithmeticError))
    return text if known and text else f"{type(error).__name__}: {text}"
