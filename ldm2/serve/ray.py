"""The server on a Ray cluster: `serve run ldm2.serve.ray:app model=tiny max_replicas=2`.

One deployment, Api, has the queue, the jobs and their files, so every client finds its job; the other, Model, has a
model in each of its replicas, whose number follows the load.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve

from ldm2.batch.maker import Maker, group_of, rows_at_once
from ldm2.batch.rows import Row
from ldm2.options import check_options, choice, flag, from_word, integer, number, option, options_of
from ldm2.samplers import Cancelled
from ldm2.serve.api import Api
from ldm2.serve.app import application
from ldm2.serve.asked import About, Asked, Upload
from ldm2.serve.engine import Engine, Watch, about, outcome
from ldm2.serve.errors import Refused
from ldm2.serve.folder import Folder
from ldm2.serve.jobs import Job, Jobs, Sound
from ldm2.serve.limits import Limits
from ldm2.serve.metrics import Metrics
from ldm2.serve.server import LOCAL

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

CLIENTS = 1000                             # requests that Api answers at once


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How many models there are, and what each of them has. Raises ValueError naming option, value and rule."""

    min_replicas: int = option(integer(1), "models at least", value=1)
    max_replicas: int = option(integer(1), "models at most", value=1)
    gpus: float = option(number(0), "GPUs of a model", value=0.0)
    cpus: float = option(number(above=0), "CPUs of a model", value=1.0)
    batch: int = option(integer(0), "requests of equal shape that run together at most; 0: as many as fit", value=0)
    device: str = option(choice(("auto", "cpu", "cuda")), "where a model runs", value="auto")
    dtype: str = option(choice(("auto", "float32", "float16", "bfloat16")), "its precision", value="auto")
    insecure: bool = option(flag(), "serve other machines without a key", value=False)

    def __post_init__(self) -> None:
        check_options(self)


class Model:
    """A model in a process of its own."""

    def __init__(self, model: str, load: Mapping[str, Any], batch: int):
        import ldm2

        self._maker = Maker(ldm2.load(model, **load), batch)
        self._one = threading.Lock()                       # a run that was cancelled ends before the next one begins

    def about(self) -> About:
        """What the other deployment has to know."""
        return replace(about(self._maker.pipe), check=_unchecked)

    async def make(self, work: Sequence[tuple[Row, Asked, bytes | None]]) -> AsyncIterator[tuple]:
        """One run: yields ("progress", stage, done, total) and ("made", id, sounds or Refused) as they come.

        work: rows of one group, each with what was asked and the bytes of its upload
        """
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[tuple | None](), threading.Event()

        def tell(event: tuple | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        run = loop.run_in_executor(None, self._run, work, stop, tell)
        try:
            while (event := await events.get()) is not None:
                yield event
            await run
        finally:
            stop.set()

    def _run(self, work: Sequence[tuple[Row, Asked, bytes | None]], stop: threading.Event, tell: Any) -> None:
        """The thread of a run."""
        try:
            with self._one, tempfile.TemporaryDirectory(prefix="ldm2-model-") as name:
                rows = [_with_upload(row, asked, sound, Path(name)) for row, asked, sound in work]
                asked_by = {row.id: asked for row, asked, _ in work}
                self._maker.stopped = stop.is_set
                self._maker.progress = lambda *event: tell(("progress", *event))
                for row, made, _ in self._maker.made(group_of(rows[0]), rows):
                    folder = Path(name) / row.id
                    folder.mkdir(exist_ok=True)
                    found = outcome(made, asked_by[row.id], folder)
                    tell(("made", row.id, found if isinstance(found, Refused) else [
                        (sound, sound.path.read_bytes()) for sound in found]))
        except Cancelled:
            pass
        finally:
            tell(None)


def _unchecked(settings: Any) -> None:
    """What a model would say is told by its run."""


def _with_upload(row: Row, asked: Asked, sound: bytes | None, folder: Path) -> Row:
    """The row with its input in a file here, under the name that its client gave it."""
    if sound is None:
        return row
    place = folder / row.id / "upload"
    place.mkdir(parents=True)
    (place / asked.upload.path.name).write_bytes(sound)
    return replace(row, input=str(place / asked.upload.path.name))


class Remote:
    """Makes jobs with one of the models of a cluster."""

    def __init__(self, handle: DeploymentHandle, jobs: Jobs):
        self._handle, self._jobs = handle.options(stream=True), jobs

    def __call__(self, jobs: list[Job]) -> None:
        """One run. Raises Cancelled."""
        named, watch = {job.id: job for job in jobs}, Watch(self._jobs, jobs)
        events: Any = self._handle.make.remote([(job.row, job.asked, _sound(job.asked.upload)) for job in jobs])
        for kind, *event in events:
            if kind == "progress":
                watch(*event)
            else:
                self._take(named[event[0]], event[1])
            if self._jobs.unwanted(jobs):
                events.cancel()
                raise Cancelled("nobody waits")

    def _take(self, job: Job, found: Refused | list[tuple[Sound, bytes]]) -> None:
        """The outcome of a job, its files put into its folder here."""
        if isinstance(found, Refused):
            self._jobs.fail(job, found)
            return
        folder, sounds = self._jobs.folder.of(job.id), []
        for sound, content in found:
            path = folder / sound.path.name
            path.write_bytes(content)
            sounds.append(replace(sound, path=path))
        self._jobs.complete(job, sounds)


def _sound(upload: Upload | None) -> bytes | None:
    return None if upload is None else upload.path.read_bytes()


class Door:
    """The application of this process, as Ray Serve calls it; the one replica of Api makes it when it starts."""

    app: FastAPI | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await Door.app(scope, receive, send)


@serve.ingress(Door())
class Gateway:
    """The queue, the jobs and the application. models: as many runs are under way at once."""

    async def __init__(  # type: ignore[misc]             # Ray awaits it
        self, handle: DeploymentHandle, limits: Limits, models: int, batch: int, **gate: Any
    ):
        known: About = await handle.about.remote()
        metrics, folder = Metrics(), Folder()
        jobs = Jobs(folder, limits, metrics)

        def most(row: Row) -> int:
            return batch or rows_at_once(row, str(known.origin["device"]), known.defaults)

        engine = Engine(jobs, Remote(handle, jobs), most, models)

        def close() -> None:
            engine.close()
            folder.close()

        Door.app = application(Api(known, jobs, limits, metrics), at_end=close, **gate)
        engine.start()


def app(args: Mapping[str, str]) -> Application:
    """What `serve run` and `serve deploy` take: `model=NAME`, and options of Cluster and Limits, as NAME=VALUE.

    The key is LDM2_API_KEY of the environment; without one requests must be for this machine by its own name.

    Raises ValueError for an unknown name or a wrong value.
    """
    words = dict(args)
    model = words.pop("model", "tiny")
    given: dict[type, dict[str, Any]] = {Cluster: {}, Limits: {}}
    for name, word in words.items():
        kind = next((cls for cls in given if name in options_of(cls)), None)
        if kind is None:
            names = ", ".join(["model", *(each for cls in given for each in options_of(cls))])
            raise ValueError(f"unknown argument {name!r}, choose from {names}")
        given[kind][name] = from_word(name, options_of(kind)[name], str(word))
    cluster, limits = Cluster(**given[Cluster]), Limits(**given[Limits])
    key = os.environ.get("LDM2_API_KEY") or None
    hosts = LOCAL if key is None and not cluster.insecure else None
    scaling = {"min_replicas": cluster.min_replicas, "max_replicas": max(cluster.min_replicas, cluster.max_replicas),
               "target_ongoing_requests": 1}
    make: Any = serve.deployment
    models = make(
        Model, name="Model", autoscaling_config=scaling, max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}).bind(
        model, {"device": cluster.device, "dtype": cluster.dtype}, cluster.batch)
    door = make(Gateway, name="Api", num_replicas=1, max_ongoing_requests=CLIENTS,
                ray_actor_options={"num_cpus": 0.1})
    return door.bind(models, limits, scaling["max_replicas"], cluster.batch, key=key, hosts=hosts)
