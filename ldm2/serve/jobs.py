"""Jobs: what waits, runs and is done. One object that clients' handlers and the worker's thread share.

A job is queued, then in_progress, and ends once: completed, failed or cancelled.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm2.batch.rows import Row
from ldm2.serve.asked import Asked
from ldm2.serve.errors import Refused
from ldm2.serve.folder import Folder
from ldm2.serve.limits import Limits
from ldm2.serve.metrics import Metrics

STATES = QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = (
    "queued", "in_progress", "completed", "failed", "cancelled",
)
LIVE = (QUEUED, IN_PROGRESS)


@dataclass(frozen=True)
class Sound:
    """One candidate of a job that is done: its file, and what it is. seconds: its length; size: of the file in bytes"""

    path: Path
    seed: int
    score: float | None
    seconds: float
    sample_rate: int
    size: int


@dataclass(eq=False)
class Job:
    """A request and what has become of it. Only `Jobs` changes one.

    client: whose it is, for the limit of each; rest: times in seconds since 1970
    """

    id: str
    asked: Asked
    client: str
    created: float = field(default_factory=time.time)
    status: str = QUEUED
    started: float | None = None
    finished: float | None = None
    stage: str | None = None
    step: int = 0
    total: int = 0
    sounds: tuple[Sound, ...] = ()
    error: Refused | None = None
    unwanted: bool = False                 # cancelled while it runs
    kept: bool = True                      # when it has ended
    denoised_since: float | None = None    # the first step's beginning

    @property
    def row(self) -> Row:
        """The job as the worker takes it."""
        upload = self.asked.upload
        return Row(0, self.id, self.asked.options, None if upload is None else str(upload.path))

    @property
    def size(self) -> int:
        """Bytes that are kept of it."""
        upload = self.asked.upload if self.status in LIVE else None
        return sum(sound.size for sound in self.sounds) + (0 if upload is None else upload.size)

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, as fast as the steps so far; None where that is not known."""
        if self.status != IN_PROGRESS or self.stage != "denoising" or not self.step:
            return None
        return (time.time() - self.denoised_since) / self.step * (self.total - self.step)


class Jobs:
    """The queue and what is kept of finished jobs, the newest last."""

    def __init__(self, folder: Folder, limits: Limits, metrics: Metrics):
        self.folder, self.limits, self.metrics = folder, limits, metrics
        self._jobs: dict[str, Job] = {}
        self._queue: list[Job] = []
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._watchers: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._closed = False
        self._mean_seconds = 1.0                           # of a job's run, the newest counting most

    # --- for clients ---

    def new_id(self) -> str:
        """A name for a job that nobody can guess."""
        return f"job-{secrets.token_hex(12)}"

    def check_room(self, client: str) -> None:
        """Raises Refused where no more jobs are taken, from anybody or from this client."""
        with self._lock:
            if self._closed:
                raise stopping()
            wait = {"Retry-After": str(min(60, max(1, round(self._mean_seconds * len(self._queue) / 2))))}
            if len(self._queue) >= self.limits.queue:
                raise Refused(429, f"{len(self._queue)} jobs are waiting: try again later", "queue_full", headers=wait)
            pending = sum(job.client == client and job.status in LIVE for job in self._jobs.values())
            if pending >= self.limits.pending:
                raise Refused(429, f"{pending} of your jobs are waiting or running: try again later",
                              "too_many_pending", headers=wait)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises Refused."""
        with self._lock:
            self.check_room(job.client)
            held = sum(other.size for other in self._jobs.values() if other.status in LIVE) + job.size
            if held > 1e6 * self.limits.keep_mb:
                raise Refused(429, f"uploads that wait take {self.limits.keep_mb:g} MB: try again later",
                              "storage_full", headers={"Retry-After": "10"})
            self._jobs[job.id] = job
            self._queue.append(job)
            self._arrived.notify_all()

    def get(self, name: str) -> Job:
        """The job of this name. Raises Refused."""
        with self._lock:
            job = self._jobs.get(name)
        if job is None:
            raise Refused(404, f"there is no job {name!r:.80}: finished ones are kept for {self.limits.keep_minutes:g} "
                          "minutes, and while there is room", "job_not_found", "id")
        return job

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        with self._lock:
            return _described(job, self._queue.index(job) + 1 if job.status == QUEUED else None)

    def all(self) -> list[Job]:
        """The jobs, the newest first."""
        with self._lock:
            return list(self._jobs.values())[::-1]

    @property
    def closed(self) -> bool:
        """Whether the server is being stopped."""
        return self._closed

    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    def cancel(self, job: Job) -> None:
        """Take it from the queue, or stop it within a step. Of a finished one: remove it with its files."""
        with self._lock:
            if job.status == QUEUED:
                self._queue.remove(job)
                self._end(job, CANCELLED)
            elif job.status == IN_PROGRESS:
                job.unwanted = True
            else:
                self._forget(job)

    def drop(self, job: Job) -> None:
        """Nobody waits for the job any more: stop it where it is, and keep nothing of it."""
        with self._lock:
            if job.status in LIVE:
                self.cancel(job)
                job.kept = False
            if job.status not in LIVE:
                self._forget(job)

    async def changes(self, job: Job, patience: float = 15.0) -> AsyncIterator[bool]:
        """True at once and after each change until the job has ended; False when nothing changed for that many seconds.

        Changes that follow each other faster than the reader reads are one.
        """
        event = asyncio.Event()
        watcher = (asyncio.get_running_loop(), event)
        with self._lock:
            self._watchers.setdefault(job.id, set()).add(watcher)
        try:
            changed = True
            while True:
                last = job.status not in LIVE
                yield changed
                if last:
                    return
                try:
                    await asyncio.wait_for(event.wait(), patience)
                    changed = True
                except TimeoutError:
                    changed = False
                event.clear()
        finally:
            with self._lock:
                watchers = self._watchers.get(job.id, set())
                watchers.discard(watcher)
                if not watchers:
                    self._watchers.pop(job.id, None)

    # --- for the worker ---

    def take(self, group: Callable[[Row], str], most: Callable[[Row], int]) -> list[Job]:
        """Wait for a job -> it, and the waiting ones of its group, in their order and not more than `most` of them.

        None are left when the server stops.
        """
        with self._lock:
            while not self._queue:
                if self._closed:
                    return []
                self._arrived.wait()
            first = self._queue[0]
            name, size = group(first.row), most(first.row)
            taken = [first, *(job for job in self._queue[1:] if group(job.row) == name)][:size]
            self._queue = [job for job in self._queue if job not in taken]
            now = time.time()
            for job in taken:
                job.status, job.started = IN_PROGRESS, now
            self._tell(*taken, *self._queue)
            return taken

    def progress(self, jobs: Sequence[Job], stage: str, done: int, total: int) -> None:
        """What the run of some jobs is at."""
        with self._lock:
            now = time.time()
            for job in jobs:
                if job.stage != stage:
                    job.denoised_since = now
                job.stage, job.step, job.total = stage, done, total
            self._tell(*jobs)

    def unwanted(self, jobs: Sequence[Job]) -> bool:
        """End those of a run that were cancelled -> whether nobody wants the rest of it."""
        with self._lock:
            for job in jobs:
                if job.status == IN_PROGRESS and job.unwanted:
                    self._end(job, CANCELLED)
            return all(job.status != IN_PROGRESS for job in jobs)

    def complete(self, job: Job, sounds: Sequence[Sound]) -> None:
        """A job's files are there."""
        with self._lock:
            if job.status != IN_PROGRESS or job.unwanted:
                self._end(job, CANCELLED)
                self.folder.forget(job.id)                 # the files are younger than its end
                return
            job.sounds = tuple(sounds)
            self._mean_seconds += 0.2 * (time.time() - job.started - self._mean_seconds)
            self._end(job, COMPLETED)
            self.sweep()

    def fail(self, job: Job, error: Refused) -> None:
        """A job could not be made."""
        with self._lock:
            if job.status in LIVE:
                job.error = error
            self._end(job, FAILED)

    def sweep(self) -> None:
        """Forget finished jobs that are too old, too many, or too big together."""
        with self._lock:
            limits = self.limits
            done = [job for job in self._jobs.values() if job.status not in LIVE]
            kept = sum(job.size for job in self._jobs.values())
            oldest = time.time() - 60 * limits.keep_minutes
            for number, job in enumerate(done):
                many = len(done) - number > limits.keep_jobs
                if many or job.finished < oldest or (kept > 1e6 * limits.keep_mb and job is not done[-1]):
                    kept -= job.size
                    self._forget(job)

    def close(self) -> None:
        """Take no more jobs, and cancel those that wait."""
        with self._lock:
            self._closed = True
            for job in list(self._queue):
                self.cancel(job)
            self._arrived.notify_all()

    def cancel_running(self) -> None:
        """Stop what runs, within a step."""
        for job in self.running():
            self.cancel(job)

    def running(self) -> list[Job]:
        """The jobs that run."""
        with self._lock:
            return [job for job in self._jobs.values() if job.status == IN_PROGRESS]

    def counts(self) -> Counter[str]:
        """How many jobs there are in each state."""
        with self._lock:
            return Counter(job.status for job in self._jobs.values())

    # --- inside, with the lock ---

    def _end(self, job: Job, status: str) -> None:
        """A job has ended; once."""
        if job.status not in LIVE:
            return
        job.status, job.finished = status, time.time()
        if status != COMPLETED:
            self.folder.forget(job.id)
        elif job.asked.upload is not None:
            job.asked.upload.path.unlink(missing_ok=True)
        self.metrics.ended(job.asked.kind, status, job.created, job.started, job.finished)
        self._tell(job, *self._queue)
        if not job.kept:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        """Nothing of a job is kept."""
        self._jobs.pop(job.id, None)
        self.folder.forget(job.id)

    def _tell(self, *jobs: Job) -> None:
        """Wake those who watch."""
        for job in jobs:
            for loop, event in self._watchers.get(job.id, ()):
                with suppress(RuntimeError):               # its loop is closed: nobody waits
                    loop.call_soon_threadsafe(event.set)


def _described(job: Job, place: int | None) -> dict[str, Any]:
    """A job as clients see it. place: in the queue."""
    url = f"/v1/jobs/{job.id}"
    return {
        "id": job.id, "kind": job.asked.kind, "status": job.status, "queue_position": place, "created": job.created,
        "started": job.started, "finished": job.finished, "stage": job.stage, "step": job.step, "total": job.total,
        "seconds_left": job.seconds_left, "settings": job.asked.told,
        "output": job.asked.form | {"format": job.asked.format},
        "results": [{"n": n, "seed": sound.seed, "score": sound.score, "seconds": sound.seconds,
                     "sample_rate": sound.sample_rate, "bytes": sound.size, "url": f"{url}/content?n={n}"}
                    for n, sound in enumerate(job.sounds, start=1)],
        "error": None if job.error is None else job.error.told(), "url": url,
    }


def stopping() -> Refused:
    """What is told while the server is being stopped."""
    return Refused(503, "the server is being stopped", "stopping", headers={"Retry-After": "10"})
