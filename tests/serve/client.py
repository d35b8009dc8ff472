"""A server in a thread of this process, and a client of it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx

from ldm2.serve import server


@contextmanager
def serving(pipe, limits=None, prepare=lambda app: None, **gate):
    """The address of a server that runs inside the block. prepare: called with its application before it starts."""
    with server.listening("127.0.0.1", 0) as place, server.opened(pipe, limits, **gate) as app:
        prepare(app)
        running = server.Server(app, 5)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield Client(f"http://127.0.0.1:{place.getsockname()[1]}", app)
        finally:
            running.should_exit = True
            thread.join(30)


class Client(httpx.Client):
    """A client that knows how to wait for jobs. app: what it talks to."""

    def __init__(self, address, app, **rest):
        super().__init__(base_url=address, timeout=60, **rest)
        self.app, self.jobs = app, app.state.api.jobs

    def ask(self, status=202, **body):
        """A new job, or the answer of another status."""
        answer = self.post("/v1/jobs", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def edit(self, path, status=202, **fields):
        """A new job of a form."""
        with open(path, "rb") as file:
            answer = self.post("/v1/jobs", data=fields, files={"audio": (path.name, file)})
        assert answer.status_code == status, answer.text
        return answer.json()

    def done(self, job, *states):
        """The job when it has ended."""
        for _ in range(3000):
            found = self.get(job["url"]).json()
            if found["status"] not in ("queued", "in_progress"):
                assert found["status"] in (states or ("completed",)), found
                return found
            time.sleep(0.01)
        raise AssertionError(f"{job['id']} does not end")
