"""The thread that owns the model: it takes jobs from the queue, those of equal shape together, and makes them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ldm2 import audio, samplers
from ldm2.batch.maker import Maker, group_of
from ldm2.batch.rows import Row
from ldm2.result import Result
from ldm2.runtime.memory import give_back
from ldm2.serve.asked import About, Asked
from ldm2.serve.errors import Refused, failed
from ldm2.serve.jobs import Job, Jobs, Sound
from ldm2.settings import GENERATE, Settings
from ldm2.stages import Stages

logger = logging.getLogger(__name__)


Make = Callable[[list[Job]], None]

_REST = 5.0                                # seconds from one tidying of the memory to the next


class Engine:
    """Threads that take jobs from a queue and have them made.

    make:    has the jobs of one run made, and completes or fails each; may raise Cancelled
    most:    how many jobs like one run together
    threads: as many as there are models
    """

    def __init__(self, jobs: Jobs, make: Make, most: Callable[[Row], int], threads: int = 1):
        self._jobs, self._make, self._most = jobs, make, most
        self._tidied = 0.0
        self._threads = [threading.Thread(target=self.run, name=f"ldm2-engine-{number}", daemon=True)
                         for number in range(threads)]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End: waiting jobs are cancelled, running ones have the time that the limits give them."""
        self._jobs.close()
        until = time.monotonic() + self._jobs.limits.grace
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._jobs.cancel_running()
        for thread in self._threads:
            thread.join(60)

    def run(self) -> None:
        """Have jobs made until the queue is closed."""
        while jobs := self._jobs.take(group_of, self._most):
            self._jobs.metrics.run(len(jobs))
            try:
                self._make(jobs)
            except samplers.Cancelled:
                self._jobs.unwanted(jobs)
            except Exception as error:                     # the thread must not end
                logger.exception("a run failed")
                for job in jobs:
                    self._jobs.fail(job, failed(error, self._jobs.folder.of(job.id)))
            if not self._jobs.waiting() and time.monotonic() > self._tidied + _REST:
                give_back()                                # what many shapes have left in pieces
                self._tidied = time.monotonic()


class Local:
    """Makes jobs with a model of this process."""

    def __init__(self, maker: Maker, jobs: Jobs):
        self._maker, self._jobs = maker, jobs

    def __call__(self, jobs: list[Job]) -> None:
        """One run. Raises Cancelled."""
        named = {job.id: job for job in jobs}
        self._maker.stopped = lambda: self._jobs.unwanted(jobs)
        self._maker.progress = Watch(self._jobs, jobs)
        for row, made, _ in self._maker.made(group_of(jobs[0].row), [job.row for job in jobs]):
            job = named[row.id]
            found = outcome(made, job.asked, self._jobs.folder.of(job.id))
            if isinstance(found, Refused):
                self._jobs.fail(job, found)
            else:
                self._jobs.complete(job, found)
        if self._maker.pipe.device.type == "cuda":
            self._jobs.metrics.device.set(torch.cuda.memory_allocated(self._maker.pipe.device))


def outcome(made: Result | Exception, asked: Asked, folder: Path) -> list[Sound] | Refused:
    """What a run has brought a job: files in its folder, or why there are none."""
    try:
        if isinstance(made, Exception):
            raise made
        return written(made, asked, folder)
    except (ValueError, ArithmeticError, RuntimeError, OSError, MemoryError, TypeError) as error:
        if not isinstance(error, ValueError):
            logger.warning("a job failed: %s", error)
        return failed(error, folder)


class Watch:
    """Tells the clients of some jobs what their run is at, and measures steps and stages."""

    def __init__(self, jobs: Jobs, running: list[Job]):
        self._jobs, self._running = jobs, running
        self._stage, self._since, self._last = "", time.perf_counter(), time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, metrics = time.perf_counter(), self._jobs.metrics
        if stage != self._stage:
            if self._stage:
                metrics.stage(self._stage, now - self._since)
            self._stage, self._since = stage, now
        elif stage == "denoising":
            metrics.step(now - self._last)
        self._last = now
        self._jobs.progress(self._running, stage, done, total)


def written(result: Result, asked: Asked, folder: Path) -> list[Sound]:
    """The files of a job, in its folder. Raises ValueError for a sound that cannot be written so, OSError."""
    if asked.upload is not None:                           # under the name that the client knows it by
        result = replace(result, settings=result.settings | {"input": asked.upload.path.name})
    paths = result.save(folder / f"sound.{asked.format}", **asked.form)
    scores = result.scores or [None] * len(paths)
    found = []
    for path, seed, score in zip(paths, result.seeds, scores):
        about = audio.describe(path)
        found.append(Sound(path, seed, score, about.num_samples / about.sample_rate, about.sample_rate,
                           path.stat().st_size))
    return found


def about(pipe: Stages) -> About:
    """What is known of a model."""

    def check(settings: Settings) -> None:
        spacing = pipe.schedule.with_spacing(settings.spacing)
        samplers.check_settings(settings.sampler, settings.steps, settings.eta, spacing)
        if settings.task == GENERATE:
            shape = pipe.latent_shape(settings.seconds)
            changes = [start for start, _ in settings.prompt_at]
            pipe.windows(shape[1], settings.window, settings.overlap, loop=settings.loop, changes=changes)

    return About(pipe.origin, pipe.defaults, pipe.sample_rate, pipe.text.is_speech_model, pipe.can_rank,
                 pipe.schedule.num_train_timesteps, check, tuple(sorted(pipe.loras)))
