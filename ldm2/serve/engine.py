"""The thread that owns the model: it takes jobs from the queue, those of equal shape together, and makes them."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

from ldm2 import audio, samplers
from ldm2.batch.maker import Maker
from ldm2.result import Result
from ldm2.serve.asked import About, Asked
from ldm2.serve.errors import failed
from ldm2.serve.jobs import Job, Jobs, Sound
from ldm2.settings import GENERATE, Settings
from ldm2.stages import Stages

logger = logging.getLogger(__name__)


class Engine:
    """Makes the jobs of a queue with one model. `run` is the life of a thread."""

    def __init__(self, maker: Maker, jobs: Jobs):
        self._maker, self._jobs = maker, jobs
        self._thread = threading.Thread(target=self.run, name="ldm2-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """End: waiting jobs are cancelled, running ones have the time that the limits give them."""
        self._jobs.close()
        self._thread.join(self._jobs.limits.grace)
        self._jobs.cancel_running()
        self._thread.join(60)

    def run(self) -> None:
        """Make jobs until the queue is closed."""
        while jobs := self._jobs.take(self._maker.group, self._maker.size):
            self._jobs.metrics.run(len(jobs))
            try:
                self._make(jobs)
            except samplers.Cancelled:
                self._jobs.unwanted(jobs)
            except Exception as error:                     # the thread must not end
                logger.exception("a run failed")
                for job in jobs:
                    self._jobs.fail(job, failed(error))
            self._jobs.metrics.device.set(_device_memory(self._maker))

    def _make(self, jobs: list[Job]) -> None:
        """One run."""
        named = {job.id: job for job in jobs}
        self._maker.stopped = lambda: self._jobs.unwanted(jobs)
        self._maker.progress = _Watch(self._jobs, jobs)
        for row, made, _ in self._maker.made(self._maker.group(jobs[0].row), [job.row for job in jobs]):
            job = named[row.id]
            try:
                if isinstance(made, Exception):
                    raise made
                self._jobs.complete(job, written(made, job.asked, self._jobs.folder.of(job.id)))
            except (ValueError, ArithmeticError, RuntimeError, OSError, MemoryError, TypeError) as error:
                if not isinstance(error, ValueError):
                    logger.warning("job %s failed: %s", job.id, error)
                self._jobs.fail(job, failed(error))


class _Watch:
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

    return About(pipe.origin, pipe.defaults, pipe.sample_rate, pipe.text.speaks, pipe.can_rank,
                 pipe.schedule.num_train_timesteps, check, tuple(sorted(pipe.loras)))


def _device_memory(maker: Maker) -> int:
    """Bytes of the GPU that are in use."""
    import torch

    return torch.cuda.memory_allocated(maker.pipe.device) if maker.pipe.device.type == "cuda" else 0
