"""The workers of a job: one in this process, or several processes that are replaced when they die."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from ldm2.batch import manifest
from ldm2.batch.remote import opened
from ldm2.batch.rows import LONGEST_REASON, Row, canonical
from ldm2.batch.tuner import PORTION, Tuner
from ldm2.fields import one_line
from ldm2.settings import PER_PROMPT

WINDOW = 4096                              # rows that are looked at together, to group those that are alike
AT_ONCE = 32                               # rows that a worker is handed at once
DEATHS = 3                                 # of workers with a row alone, after which it is the row's fault
EARLY = 8                                  # deaths of workers in a row before their model is loaded, which ends the job

Done = Callable[[dict[str, Any]], object]


class JobError(RuntimeError):
    """The job cannot go on: nothing can be written, or no worker starts."""


def chunks(rows: Iterable[Row], workers: int) -> Iterator[list[Row]]:
    """Rows in portions for workers, those that can run together beside each other."""
    rows = iter(rows)
    while window := list(itertools.islice(rows, WINDOW)):
        window.sort(key=lambda row: canonical({name: value for name, value in row.options.items()
                                               if name not in (*PER_PROMPT, "seed")}))
        size = max(1, min(AT_ONCE, len(window) // (2 * workers)))
        yield from (window[start:start + size] for start in range(0, len(window), size))


class Here:
    """A worker in this process, whose model is loaded when there is a row."""

    workers = 1

    def __init__(self, arguments: dict[str, Any], done: Done):
        self._arguments, self._done = arguments, done

    def run(self, rows: Iterable[Row], left: int = 0) -> None:
        """Make rows. Raises JobError if nothing can be written."""
        from ldm2.batch.worker import Worker

        worker = None
        try:
            for portion in chunks(rows, 1):
                worker = worker or Worker(**self._arguments)
                try:
                    worker.run(portion, self._done)
                except OSError as error:
                    raise JobError(str(error)) from error
        finally:
            if worker is not None:
                worker.close()


class Pool:
    """Processes with a worker each. A dead one is replaced, and its rows that are not written are made again.

    tuner: chooses how many of the processes work, and with how many threads; default: all of them, as they are.
    """

    def __init__(self, arguments: Sequence[dict[str, Any]], done: Done, tuner: Tuner | None = None):
        self._arguments, self._done, self._tuner = arguments, done, tuner
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        self._again = deque[list[Row]]()
        self._grow(len(arguments) if tuner is None else 1)

    @property
    def workers(self) -> int:
        """Processes that work."""
        return len(self._members)

    def run(self, rows: Iterable[Row], left: int = 0) -> None:
        """Make rows, `left` in number. Raises JobError."""
        self._source, self._left = chunks(rows, len(self._arguments)), left
        try:
            while True:
                for number, member in enumerate(self._members):
                    if not member.busy and (portion := self._portion(number)):
                        member.give(portion, 0 if self._tuner is None else self._tuner.plan.threads)
                if not any(member.busy for member in self._members):
                    break
                wait([thing for member in self._members for thing in (member.connection, member.process.sentinel)],
                     timeout=1)
                for number, member in enumerate(self._members):
                    self._again.extend(self._heard(number, member))
                if self._tuner is not None:
                    self._follow(self._tuner)
        finally:
            self._end()

    def _portion(self, number: int) -> list[Row] | None:
        """The next rows for a process, if it is to work."""
        tuner = self._tuner
        if tuner is not None and number >= tuner.plan.workers:
            return None
        portion = self._again.popleft() if self._again else next(self._source, None)
        if portion and tuner is not None and not tuner.settled and len(portion) > PORTION:
            self._again.appendleft(portion[PORTION:])
            portion = portion[:PORTION]
        return portion

    def _grow(self, count: int) -> None:
        """Start processes until there are so many."""
        for arguments in self._arguments[len(self._members):count]:
            self._members.append(_Member(self._context, arguments))

    def _follow(self, tuner: Tuner) -> None:
        """Have as many processes as the tuner's plan wants."""
        if tuner.coming is not None:
            self._grow(tuner.coming.workers)
            if all(member.ready for member in self._members):
                tuner.ready()
        elif tuner.settled:
            for member in self._members[tuner.plan.workers:]:
                if not member.busy:
                    self._members.remove(member)
                    member.end(time.monotonic() + 5)

    def _heard(self, number: int, member: _Member) -> list[list[Row]]:
        """Take a member's messages; the portions to hand out again if it has died."""
        dead = not member.process.is_alive()               # before the messages: a dead one sends no more
        for word, record in member.messages():
            if word == "row":
                row = member.rows.pop(record["id"], None)
                self._left -= 1
                if self._tuner is not None and row is not None:
                    self._tuner.made(number, row.kind, record["ms"])
                self._done(record)
            elif word == "idle":
                member.busy = False
                if self._tuner is not None:
                    self._tuner.finished(number, self._left, member.process.pid)
            elif word == "fatal":
                raise JobError(record)
        return self._replaced(member) if dead else []

    def _replaced(self, member: _Member) -> list[list[Row]]:
        """A new process for a dead one. Returns portions of the rows that are left, each row alone."""
        member.start()
        written = manifest.written(opened(member.arguments["out"]), member.arguments["name"])
        left, member.rows, member.busy = member.rows, {}, False
        portions = []
        for row in left.values():
            record = written.get(row.id, {})
            member.deaths[row.id] = member.deaths.get(row.id, 0) + (len(left) == 1)
            if record.get("status") == manifest.OK and record.get("asked") == row.asked:
                self._left -= 1
                self._done(record)
            elif member.deaths[row.id] >= DEATHS:
                why = f"line {row.line}: {DEATHS} workers died of it"
                portions.append([replace(row, error=why)])
            else:
                portions.append([row])
        return portions

    def _end(self) -> None:
        """Ask those that still run to stop within a step; end those that do not."""
        for member in self._members:
            member.dismiss()
        until = time.monotonic() + 30
        for member in self._members:
            member.end(until)


class _Member:
    """A process with a worker, and the rows that it has been given, by their ids."""

    def __init__(self, context: Any, arguments: dict[str, Any]):
        self._context, self.arguments = context, arguments
        self.rows: dict[str, Row] = {}
        self.busy = False                                  # from being given rows until it says that it is idle
        self.ready = False                                 # when its model is loaded
        self.deaths: dict[str, int] = {}
        self._early = 0
        self.start()

    def start(self) -> None:
        """A new process. Raises JobError if several have died before they were ready."""
        if self._early >= EARLY:
            raise JobError(f"{EARLY} workers died before they were ready")
        self._early += 1
        self.ready = False
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_serve, args=(theirs, os.getpid(), self.arguments), daemon=True)
        try:
            self.process.start()
        except OSError:                                    # killed before it could read what it is to do
            self.start()
        finally:
            theirs.close()

    def give(self, rows: Sequence[Row], threads: int) -> None:
        """Hand out rows; threads: to make them with, 0 leaves the number as it is."""
        self.rows, self.busy = {row.id: row for row in rows}, True
        try:
            self.connection.send((list(rows), threads))
        except OSError:                                    # it has died: noticed with its next message
            return

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What has arrived."""
        try:
            while self.connection.poll():
                word, record = self.connection.recv()
                self._early, self.ready = 0, True
                yield word, record
        except (EOFError, OSError):
            return

    def dismiss(self) -> None:
        """Let it end: at once, or within a step."""
        with suppress(OSError):
            self.connection.send(None)
        if self.busy:
            self.process.terminate()

    def end(self, until: float) -> None:
        """Let it end until a time, then end it."""
        self.dismiss()
        self.process.join(max(0.1, until - time.monotonic()))
        self.process.kill()


def _serve(connection: Connection, parent: int, arguments: dict[str, Any]) -> None:
    """The life of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is the parent's to answer
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch

        from ldm2.batch.worker import Worker
        from ldm2.samplers import Cancelled

        worker = Worker(**arguments)
        worker.stopped = asked_to_stop.is_set
        connection.send(("ready", None))
        while not asked_to_stop.is_set() and (portion := connection.recv()) is not None:
            rows, threads = portion
            if threads:
                torch.set_num_threads(threads)
            try:
                worker.run(rows, lambda record: connection.send(("row", record)))
            except Cancelled:
                return
            connection.send(("idle", None))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(("fatal", one_line(error, LONGEST_REASON)))
        sys.exit(1)


def _leave_with(parent: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
