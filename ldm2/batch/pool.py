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
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from ldm2.batch import manifest
from ldm2.batch.remote import opened
from ldm2.batch.rows import LONGEST_REASON, Row, canonical
from ldm2.fields import one_line
from ldm2.settings import PER_PROMPT

WINDOW = 4096                              # rows that are looked at together, to group those that are alike
AT_ONCE = 32                               # rows that a worker is handed at once
DEATHS = 3                                 # of workers with a row alone, after which it is the row's fault

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


def run_here(arguments: dict[str, Any], rows: Iterable[Row], done: Done) -> None:
    """Make rows in this process; the model is loaded when there is a row. Raises JobError if nothing can be written."""
    from ldm2.batch.worker import Worker

    worker = None
    try:
        for portion in chunks(rows, 1):
            worker = worker or Worker(**arguments)
            try:
                worker.run(portion, done)
            except OSError as error:
                raise JobError(str(error)) from error
    finally:
        if worker is not None:
            worker.close()


class Pool:
    """Processes with a worker each. A dead one is replaced, and its rows that are not written are made again."""

    def __init__(self, arguments: Sequence[dict[str, Any]], done: Done):
        self._arguments, self._done = arguments, done
        self._context = multiprocessing.get_context("spawn")
        self._members = [_Member(self._context, each) for each in arguments]

    def run(self, rows: Iterable[Row]) -> None:
        """Make rows. Raises JobError."""
        source, again = chunks(rows, len(self._members)), deque[list[Row]]()
        try:
            while True:
                for member in self._members:
                    if not member.busy and (portion := again.popleft() if again else next(source, None)):
                        member.give(portion)
                busy = [member for member in self._members if member.busy]
                if not busy:
                    break
                wait([thing for member in busy for thing in (member.connection, member.process.sentinel)], timeout=1)
                for member in busy:
                    again.extend(self._heard(member))
        finally:
            self._end()

    def _heard(self, member: _Member) -> list[list[Row]]:
        """Take a member's messages; the portions to hand out again if it has died."""
        dead = not member.process.is_alive()               # before the messages: a dead one sends no more
        for word, record in member.messages():
            if word == "row":
                member.rows.pop(record["id"], None)
                self._done(record)
            elif word == "idle":
                member.busy = False
            elif word == "fatal":
                raise JobError(record)
        return self._replaced(member) if dead and member.busy else []

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
            if member.busy:
                member.process.terminate()
        until = time.monotonic() + 30
        for member in self._members:
            member.process.join(max(0.1, until - time.monotonic()))
            member.process.kill()


class _Member:
    """A process with a worker, and the rows that it has been given, by their ids."""

    def __init__(self, context: Any, arguments: dict[str, Any]):
        self._context, self.arguments = context, arguments
        self.rows: dict[str, Row] = {}
        self.busy = False                                  # from being given rows until it says that it is idle
        self.deaths: dict[str, int] = {}
        self._early = 0
        self.start()

    def start(self) -> None:
        """A new process. Raises JobError if several have died before they were ready."""
        if self._early >= DEATHS:
            raise JobError(f"{DEATHS} workers died before they were ready")
        self._early += 1
        self.connection, theirs = self._context.Pipe()
        self.process = self._context.Process(target=_serve, args=(theirs, os.getpid(), self.arguments), daemon=True)
        try:
            self.process.start()
        except OSError:                                    # killed before it could read what it is to do
            self.start()
        finally:
            theirs.close()

    def give(self, rows: Sequence[Row]) -> None:
        """Hand out rows."""
        self.rows, self.busy = {row.id: row for row in rows}, True
        try:
            self.connection.send(list(rows))
        except OSError:                                    # it has died: noticed with its next message
            return

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What has arrived."""
        try:
            while self.connection.poll():
                word, record = self.connection.recv()
                self._early = 0
                yield word, record
        except (EOFError, OSError):
            return

    def dismiss(self) -> None:
        """Let it end."""
        try:
            self.connection.send(None)
        except OSError:
            return


def _serve(connection: Connection, parent: int, arguments: dict[str, Any]) -> None:
    """The life of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is the parent's to answer
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from ldm2.batch.worker import Worker
        from ldm2.samplers import Cancelled

        worker = Worker(**arguments)
        worker.stopped = asked_to_stop.is_set
        while not asked_to_stop.is_set() and (rows := connection.recv()) is not None:
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
