"""A server in a process of its own, and a crowd of clients: what `benchmarks.serve` works with."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROMPTS = ("a rising sweep", "low hum", "a high tone", "white noise", "a dog barking", "wind", "rain", "clapping")
SHORT = {"steps": 4, "seconds": 0.5}
PATIENCE = 60.0                            # seconds until an answer must have begun


class Server:
    """`ldm2 serve --model tiny` in a process of its own, whose temporary files lie in `folder`."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        environment = os.environ | {"TMPDIR": str(folder)}
        command = [sys.executable, "-m", "ldm2", "serve", "--model", "tiny", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.address = ""
        for line in self.process.stderr:
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                break
        if not self.address:
            raise RuntimeError("ldm2 serve did not start")
        threading.Thread(target=self._read, daemon=True).start()
        self.client = httpx.Client(base_url=self.address, timeout=PATIENCE)

    def _read(self) -> None:
        self.said = self.process.stderr.read()

    def resident(self) -> int:
        """Bytes of memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s*(\d+)", text)[1])

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def counted(self, name: str) -> Counter[str]:
        """A counter of /metrics by its labels."""
        found = re.findall(rf"^{name}_total{{(.*?)}} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return Counter({labels: int(float(value)) for labels, value in found})

    def files(self) -> list[Path]:
        """What lies in the temporary folder beside the lock."""
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name != "lock"]

    def stop(self) -> int:
        """Stop it politely -> its exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def served(*arguments: str) -> Iterator[Server]:
    """A server that is stopped at the end of the block."""
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name), *arguments)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()


def ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job when it has ended, looked for more and more seldom."""
    pause = 0.01
    while True:
        found = client.get(job["url"]).json()
        if found["status"] not in ("queued", "in_progress"):
            return found
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


@dataclass
class Crowd:
    """Clients that take requests from one counter, and what they have seen."""

    server: Server
    total: int
    sound: Path
    taken: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    memory: list[int] = field(default_factory=list)        # at request 200, 400, ...

    def live(self, number: int) -> None:
        """The life of a client."""
        draw = random.Random(number)
        with httpx.Client(base_url=self.server.address, timeout=PATIENCE) as client:
            while self._take():
                kind = draw.choices(("job", "edit", "wait", "cancel", "cut", "unwatched"), (30, 15, 25, 12, 12, 6))[0]
                try:
                    self._note(getattr(self, f"_{kind}")(client, draw))
                except httpx.TransportError as error:
                    self._note(f"lost: {type(error).__name__}")

    def _take(self) -> bool:
        with self.lock:
            self.taken += 1
            if self.taken % 200 == 0:
                self.memory.append(self.server.resident())
            return self.taken <= self.total

    def _note(self, what: str) -> None:
        with self.lock:
            self.seen[what] += 1

    def _asked(self, client: httpx.Client, draw: random.Random, **more: Any) -> dict[str, Any]:
        """A new job, asked for until the queue has room."""
        body = {"prompt": draw.choice(PROMPTS), "steps": draw.choice((2, 4, 4, 4, 8)), "seconds": draw.choice((0.5, 1))}
        while True:
            answer = client.post("/v1/jobs", json=body | more)
            if answer.status_code != 429:
                answer.raise_for_status()
                return answer.json()
            self._note("asked to come again")
            time.sleep(float(answer.headers["retry-after"]))

    def _job(self, client: httpx.Client, draw: random.Random) -> str:
        """Ask, wait, listen, remove."""
        job = ended(client, self._asked(client, draw, num_waveforms=draw.choice((1, 1, 1, 2))))
        if job["status"] == "completed":
            assert len(client.get(job["results"][0]["url"]).content) == job["results"][0]["bytes"]
        client.delete(job["url"])
        return job["status"]

    def _edit(self, client: httpx.Client, draw: random.Random) -> str:
        """A form with a sound."""
        while True:
            answer = client.post("/v1/jobs", files={"audio": ("x.wav", self.sound.read_bytes())}, data={
                "kind": draw.choice(("transfer", "extend")), "prompt": "hum", "steps": "3"})
            if answer.status_code != 429:
                break
            time.sleep(float(answer.headers["retry-after"]))
        answer.raise_for_status()
        job = ended(client, answer.json())
        client.delete(job["url"])
        return job["status"]

    def _wait(self, client: httpx.Client, draw: random.Random) -> str:
        """A sound while waiting."""
        while True:
            answer = client.post("/v1/audio/generate", json={"input": draw.choice(PROMPTS), **SHORT})
            if answer.status_code != 429:
                return "completed" if answer.status_code == 200 else f"answered {answer.status_code}"
            time.sleep(float(answer.headers["retry-after"]))

    def _cancel(self, client: httpx.Client, draw: random.Random) -> str:
        """Cancel a job at some time."""
        job = self._asked(client, draw, steps=100)
        time.sleep(draw.random() / 2)
        client.delete(job["url"])
        answer = client.get(job["url"])
        status = ended(client, job)["status"] if answer.status_code == 200 else "completed"
        client.delete(job["url"])
        return status

    def _cut(self, client: httpx.Client, draw: random.Random) -> str:
        """Go away while waiting."""
        try:
            httpx.post(f"{self.server.address}/v1/audio/generate", timeout=0.05 + draw.random() / 3, json={
                "prompt": draw.choice(PROMPTS), "steps": 60, "seconds": 2})
        except httpx.TimeoutException:
            return "cut off"
        return "completed"

    def _unwatched(self, client: httpx.Client, draw: random.Random) -> str:
        """Leave the stream of events in the middle, then cancel."""
        job = self._asked(client, draw)
        with client.stream("GET", f"{job['url']}/events") as answer:
            next(answer.iter_lines())
        client.delete(job["url"])
        return "left"
