"""A server from its parts: a model, a queue, a temporary folder, an application, a socket."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from ldm2.batch.maker import Maker
from ldm2.pipeline import AudioLDM2
from ldm2.serve.api import Api
from ldm2.serve.app import application
from ldm2.serve.engine import Engine, Local, about
from ldm2.serve.folder import Folder
from ldm2.serve.jobs import Jobs
from ldm2.serve.limits import Limits
from ldm2.serve.metrics import Metrics

LOCAL = ("localhost", "127.0.0.1", "::1")  # names of this machine
FIRST_PORT, PORTS = 8000, 20               # where a free one is looked for


@contextmanager
def opened(pipe: AudioLDM2, limits: Limits | None = None, batch: int = 0, **gate: object) -> Iterator[FastAPI]:
    """`with opened(pipe) as app:` an application with its worker; at the end the worker stops and its files go.

    batch: of Maker; gate: key, hosts and origins of `application`
    """
    limits, metrics, folder = limits or Limits(), Metrics(), Folder()
    try:
        jobs = Jobs(folder, limits, metrics)
        maker = Maker(pipe, batch)
        engine = Engine(jobs, Local(maker, jobs), maker.size)
        engine.start()
        try:
            yield application(Api(about(pipe), jobs, limits, metrics), **gate)  # type: ignore[arg-type]
        finally:
            engine.close()
    finally:
        folder.close()


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens; of no given port the first that is free. Raises OSError naming the place."""
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    for number in ports:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family, backlog=256)
        except OSError as error:
            if port is not None or number == ports[-1]:
                raise OSError(f"{host}:{number} cannot be listened on: {error.strerror or error}") from None
    raise AssertionError("there is a port to try")


class Server(uvicorn.Server):
    """uvicorn's, which at SIGINT or SIGTERM refuses new jobs at once and returns when all is answered."""

    def __init__(self, app: FastAPI, grace: float):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                        timeout_graceful_shutdown=int(grace) + 5))
        self._jobs: Jobs = app.state.api.jobs
        self._stopping = app.state.stopping

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Both signals end `run`, and nothing else."""
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more jobs, give those that run their time, and answer who still waits."""
        self._jobs.close()
        for stop in self._stopping:
            stop()
        later = asyncio.get_running_loop().call_later(self._jobs.limits.grace, self._jobs.cancel_running)
        await super().shutdown(sockets)
        later.cancel()
