"""The command `ldm2 batch`: a table of prompts and options -> a folder of sound files and a manifest."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ldm2 import audio
from ldm2.batch import cluster, manifest, measured, pool
from ldm2.batch import job as jobs
from ldm2.batch.job import Job, Survey
from ldm2.batch.measured import Tally
from ldm2.batch.remote import of_one_process
from ldm2.batch.tuner import Tuner
from ldm2.cli import options
from ldm2.cli.output import say
from ldm2.cli.signals import exit_code
from ldm2.options import from_word, options_of, refuse_unknown
from ldm2.runtime import machine
from ldm2.settings import PER_PROMPT, Output, Settings

FORMATS = ("flac", "wav", "ogg", "opus", "mp3")
SECONDS_BETWEEN_LINES = 10.0


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "batch", help="make the sounds of a table of prompts and options; run again to resume",
        description="Make the sounds of a table. Run the same command again to go on where it was stopped.",
        epilog="For example: ldm2 batch prompts.csv -o sounds --set steps=50 --workers 2")
    command.add_argument("input", metavar="INPUT", help="table .jsonl, .csv, .parquet or .txt (a prompt a line), or - "
                         "for stdin; columns are options by their names, and prompt, id, task, input")
    command.add_argument("-o", "--output", metavar="FOLDER", required=True, help="folder for audio/ and manifest.jsonl")
    command.add_argument("--format", choices=FORMATS, default="flac", help="of the files (default: flac)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                         help="an option for the rows that do not give it; may be repeated")
    command.add_argument("--batch", type=_batch, default=0, metavar="N", help="rows that run together, or auto: as "
                         "many as fit (default: auto)")
    command.add_argument("--workers", type=_count, metavar="N", help="processes (default: one a GPU; on "
                         "a CPU as many as are fastest, which is measured, or one with --batch 1)")
    command.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="run the workers on a Ray cluster "
                         "(default: that of RAY_ADDRESS, or one that is started here); FOLDER must be shared")
    command.add_argument("--shard", type=_shard, metavar="I/N", help="make the I-th of N parts of the rows (default: "
                         "from SLURM_ARRAY_TASK_ID or RANK and WORLD_SIZE, else all)")
    command.add_argument("--retry-failed", action="store_true", help="try rows again that failed before")
    command.add_argument("--allow-extra", action="store_true", help="carry columns through whose names are like those "
                         "of options")
    command.add_argument("--dry-run", action="store_true", help="read the table, tell what there is to do and what is "
                         "wrong with it, and do nothing")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress")
    section = command.add_argument_group(options.HEADINGS["output"])
    for name, each in options_of(Output).items():
        options.add_option(section, Output, name, each, "")
    options.add_model_options(command)
    command.set_defaults(run=batch)


def batch(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit code: 1 if a row failed."""
    with ExitStack() as stack:
        job = _job(args)
        if args.input == "-":
            job = stack.enter_context(jobs.from_stdin(job, sys.stdin.buffer))
        if args.dry_run:
            return _dry_run(job, args.workers)
        share = None
        if args.ray is not None:
            job, share = _on_ray(job, args, stack)
        stack.enter_context(closing(jobs.open_place(job, sys.argv[1:])))
        found = jobs.survey(job, manifest.settled(job.place))
        status = Status(found, None if args.quiet else sys.stderr)
        try:
            with status:
                _run(job, args.workers, share, found, status)
        except KeyboardInterrupt as stop:
            say(f"stopped after {status.made} of {found.rows} rows: run the same command again to go on")
            return exit_code(stop)
        except pool.JobError as error:
            say(f"error: {error}; run the same command again to go on")
            return 1
        jobs.finish(job, found.order)
        print(f"{found.rows} rows: {found.through[manifest.OK]} were done before, {status.ok} done now, "
              f"{status.failed} failed; see {job.place.where('manifest.jsonl')}")
        return 1 if status.failed else 0


def _job(args: argparse.Namespace) -> Job:
    """The job of a command line. Raises ValueError."""
    load = {name: getattr(args, name) for name in
            ("device", "dtype", "reference", "revision", "variant", "local_files_only", "tokenizers", "low_memory",
             "compile")}
    form = options.given(args, Output)
    audio.check_format(f"sound.{args.format}", sample_rate=form.get("sample_rate"), encoding=Output(**form).encoding)
    return Job(Path(args.input).expanduser(), args.output, args.model, load, args.format, form, _defaults(args.set),
               args.allow_extra, args.shard or _shard_around(), args.retry_failed, args.batch)


def _defaults(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE, each -> options for all rows. Raises ValueError."""
    known = options_of(Settings)
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, for example steps=50, got {word!r}")
        refuse_unknown("batch", [name], known)
        values[name] = text if name in PER_PROMPT else from_word(name, known[name], text)
    return values


def _on_ray(job: Job, args: argparse.Namespace, stack: ExitStack) -> tuple[Job, cluster.Share]:
    """The job as the machines of a cluster are to do it, and what it takes of the cluster."""
    stack.enter_context(cluster.connected(args.ray))
    share = cluster.Share.of(args.workers, gpus=0 if args.device == "cpu" else None)
    cluster.check_shared(job.place)
    device = "cuda" if share.gpus else "cpu"
    out = job.out if "://" in job.out else os.path.abspath(os.path.expanduser(job.out))
    return replace(job, out=out, load=dict(job.load) | {"device": device}, elsewhere=device), share


def _run(job: Job, workers: int | None, share: cluster.Share | None, found: Survey, status: Status) -> None:
    """Make the rows that are left, in as many processes as asked for."""
    left, tally = found.rows - found.through.total(), Tally(status)
    if not left:
        return
    rows = tally.passing(job.some(found))
    if share is not None:
        cluster.run(_arguments(job), rows, share, tally)
        return
    devices = _devices(job, workers, left)
    tuner = None
    if len(devices) > 1 and of_one_process(job.place):
        raise ValueError(f"{job.place} is of one process: leave out --workers")
    if workers is None and _may_tune(job, devices, left):
        tuner = Tuner(machine.cores(), say if status.shows else lambda line: None)
        devices *= machine.cores()
    threads = 0 if workers is None else max(1, machine.cores() // len(devices))
    arguments = [_arguments(job) | {"name": f"{job.part}-{number}", "threads": threads,
                                    "load": dict(job.load) | {"device": device}}
                 for number, device in enumerate(devices)]
    made_in = pool.Pool(arguments, tally, tuner) if len(devices) > 1 else pool.Here(arguments[0], tally)
    try:
        made_in.run(rows, left)
    finally:
        measured.keep(job.model, job.load, made_in.workers, tally.taken)


def _may_tune(job: Job, devices: list[str], left: int) -> bool:
    """Whether to find out how many processes are best: on a CPU, if rows may have company, which changes rounding as
    the number of threads does."""
    from ldm2.runtime.device import choose_device

    return (len(devices) == 1 and choose_device(devices[0]).type == "cpu" and job.batch != 1 and left > pool.AT_ONCE
            and machine.cores() > 1 and not of_one_process(job.place))


def _arguments(job: Job) -> dict[str, Any]:
    """What all workers of a job are built of."""
    return {"model": job.model, "out": job.out, "format": job.format, "batch": job.batch, "load": dict(job.load),
            "form": dict(job.form), "allow_extra": job.allow_extra}


def _devices(job: Job, workers: int | None, left: int) -> list[str]:
    """The device of each worker: one a GPU, one on a CPU, or as many as asked for, taking turns on the GPUs."""
    import torch

    device = job.load["device"]
    cards = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    local = os.environ.get("LOCAL_RANK", "")
    if cards and local.isdecimal() and workers is None:
        return [f"cuda:{int(local) % cards}"]
    count = min(workers or max(1, cards), left)
    return [f"cuda:{number % cards}" if cards else device for number in range(count)]


def _dry_run(job: Job, workers: int | None) -> int:
    """Tell what there is to do. Nothing is written, no model is loaded."""
    found = jobs.survey(job, manifest.settled(job.place), errors=50)
    left = found.rows - found.through.total()
    print(f"{found.rows} rows: {found.through[manifest.OK]} done, {found.through[manifest.ERROR]} failed before, "
          f"{left} to do, {found.failed} with errors in the table")
    for kind, count in found.groups.most_common(20):
        print(f"{count:>9}  {', '.join(f'{name} {value}' for name, value in kind).removeprefix('task ')}")
    if len(found.groups) > 20:
        print(f"           and {len(found.groups) - 20} other kinds")
    if found.waiting:
        print(_estimated(job, found, workers))
    for error in found.errors:
        print(error)
    if found.failed > len(found.errors):
        print(f"and {found.failed - len(found.errors)} more errors")
    return 1 if found.failed else 0


def _estimated(job: Job, found: Survey, workers: int | None) -> str:
    """How long it will take, and how large it will be."""
    about = measured.estimate(job.model, job.load, found.waiting)
    if about is None:
        return f"time and size: nothing has been measured on this machine with {job.model}; the first job does"
    at_once, rows = workers or about.workers, found.waiting.total()
    told = f"{about.known} of them" if 0 < about.known < rows else "them" if about.known else "none of them, but others"
    return (f"about {_duration(about.seconds / at_once)} and {about.bytes / 1e6:.1f} MB to go in {at_once} "
            f"process{'es' * (at_once > 1)}, by what rows like {told} took on this machine")


def _duration(seconds: float) -> str:
    """Seconds for people."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class Status:
    """Counts records as they come, and shows one bar for the job, or a line now and then where there is no terminal."""

    def __init__(self, found: Survey, file: TextIO | None):
        self._total, self._file, self._bar = found.rows, file, None
        self._before = found.through.total()
        self._counts: Counter = Counter({manifest.ERROR: found.through[manifest.ERROR]})
        self._now = 0
        self._start = self._said = time.monotonic()

    @property
    def shows(self) -> bool:
        """Whether anybody wants to see it."""
        return self._file is not None

    @property
    def made(self) -> int:
        """Rows that are through."""
        return self._before + self._now

    @property
    def ok(self) -> int:
        """Rows done by this run."""
        return self._counts[manifest.OK]

    @property
    def failed(self) -> int:
        """Rows that failed, now or before."""
        return self._counts[manifest.ERROR]

    def __enter__(self) -> Status:
        if self._file is not None and self._file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._before, file=self._file, unit="row", dynamic_ncols=True,
                             bar_format="{desc}: {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]", leave=False)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, record: dict[str, Any]) -> None:
        """Count a record."""
        self._now += 1
        self._counts[record["status"]] += 1
        if self._bar is not None:
            self._bar.set_description_str(self._words(), refresh=False)
            self._bar.update(1)
        elif self._file is not None and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            left = (self._said - self._start) / self._now * (self._total - self.made)
            print(f"ldm2: {self.made} of {self._total} rows, {self._words()}, {left:.0f} s left", file=self._file,
                  flush=True)

    def _words(self) -> str:
        """How fast, and how many failures."""
        minutes = max(time.monotonic() - self._start, 1e-9) / 60
        return f"{self._now / minutes:.0f} rows a minute, {self.failed} failed"


def _batch(text: str) -> int:
    """"auto" -> 0, "8" -> 8."""
    return 0 if text == "auto" else _count(text)


def _count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    """"2/4" -> (2, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, for example 2/4, got {text!r}")
    return int(number), int(count)


def _shard_around() -> tuple[int, int]:
    """The part that a cluster has given this process; everything where there is none. Raises ValueError for a part that
    cannot be: some rows would be nobody's."""
    def number(name: str, default: int = 0) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else default

    place, count, names = 0, 1, ""
    if "SLURM_ARRAY_TASK_ID" in os.environ and number("SLURM_ARRAY_TASK_COUNT") > 1:
        step = max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        place, rest = divmod(number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN"), step)
        count, names = number("SLURM_ARRAY_TASK_COUNT"), "SLURM_ARRAY_TASK_ID"
        place = -1 if rest else place
    elif number("WORLD_SIZE") > 1:
        place, count, names = number("RANK", -1), number("WORLD_SIZE"), "RANK"
    if not 0 <= place < count:
        raise ValueError(f"{names} {os.environ.get(names)} is none of {count} tasks in a row: say which part this is, "
                         f"--shard I/N")
    return place + 1, count
