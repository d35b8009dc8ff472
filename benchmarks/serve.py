"""ldm2 serve under fire, and what it costs: the model tiny behind HTTP.

    python -m benchmarks.serve [--requests 2000] [--clients 32] [--hostile 200] [--generator PROGRAM] [--out FOLDER]

overhead: a request against a call of `generate` in the same process, in turns
cancel:   steps that a running job of 200 takes after it was cancelled
eight:    eight equal requests at once against one after another
mixed:    many requests from many clients, three in ten cancelled or cut off: states, files, memory, answers
hostile:  requests that nobody should send: a 4xx with one line each
kill:     kill -9 in the middle of work, and a new start
client:   a client that openapi-python-client (--generator) makes from the OpenAPI document

Prints a Markdown table and writes it under --out. On a machine that others use, only processor times mean something.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import report
from benchmarks.arguments import add_out, count
from benchmarks.crowd import PATIENCE, SHORT, Crowd, Server, ended, served
from benchmarks.hostile import REQUESTS
from ldm2 import audio
from ldm2.runtime import machine

CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from made_client import Client
from made_client.api.jobs import cancel_job, create_job, get_content, get_job, list_jobs
from made_client.api.server import capabilities
from made_client.api.while_you_wait import generate
from made_client.models import CreateJobJsonBody, Error, GenerateBody

client = Client(base_url=sys.argv[2], timeout=60)
asked = {"prompt": "hum", "steps": 2, "seconds": 0.5}
job = create_job.sync(client=client, body=CreateJobJsonBody.from_dict(asked))
while job.status in ("queued", "in_progress"):
    time.sleep(0.05)
    job = get_job.sync(job.id, client=client)
assert job.status == "completed" and [each.id for each in list_jobs.sync(client=client).data] == [job.id]
assert get_content.sync_detailed(job.id, client=client).content[:4] == b"RIFF"
assert cancel_job.sync(job.id, client=client).id == job.id and list_jobs.sync(client=client).data == []
assert generate.sync_detailed(client=client, body=GenerateBody.from_dict(asked)).content[:4] == b"RIFF"
wrong = create_job.sync(client=client, body=CreateJobJsonBody.from_dict(asked | {"steps": -1}))
assert isinstance(wrong, Error) and wrong.error.param == "steps"
assert capabilities.sync_detailed(client=client).status_code == 200
"""


# --- what it costs ---------------------------------------------------------------------------------------------------

def overhead(args: argparse.Namespace) -> list[str]:
    """A request against a call, in one process, in turns."""
    import torch

    import ldm2
    from ldm2.serve import server as serving

    torch.set_num_threads(1)                               # no threads that wait for each other on a busy machine
    pipe, body = ldm2.load("tiny"), {"steps": 5, "seconds": 1.0, "seed": 1}
    calls: dict[str, list[float]] = {"call": [], "request": [], "call, CPU": [], "request, CPU": []}
    with serving.listening("127.0.0.1", 0) as place, serving.opened(pipe) as app:
        running = serving.Server(app, 1)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{place.getsockname()[1]}", timeout=PATIENCE)
        ways: dict[str, Callable[[dict], Any]] = {
            "call": lambda body: pipe.generate(**body),
            "request": lambda body: client.post("/v1/audio/generate", json=body).raise_for_status()}
        while not running.started:
            time.sleep(0.01)
        for turn in range(args.turns + 3):
            for name, make in ways.items():
                start, cpu = time.perf_counter(), time.process_time()
                make(body | {"prompt": f"hum {turn}"})     # prompts are remembered: a new one each time
                if turn >= 3:
                    calls[name].append(time.perf_counter() - start)
                    calls[f"{name}, CPU"].append(time.process_time() - cpu)
        running.should_exit = True
        thread.join()
    middle = {name: 1e3 * statistics.median(times) for name, times in calls.items()}
    rows = []
    for kind in ("", ", CPU"):
        call = middle[f"call{kind}"]
        more = 1e3 * statistics.median(b - a for a, b in zip(calls[f"call{kind}"], calls[f"request{kind}"]))
        rows.append(f"| overhead of a request over `generate` ({call:.0f} ms){kind or ', wall clock'} | "
                    f"below 15 ms + 3 % = {15 + 0.03 * call:.1f} ms | {more:.1f} ms |")
    return rows


def cancel(args: argparse.Namespace) -> list[str]:
    """Steps between a cancel and the end."""
    late, begun = [], []
    with served() as server:
        client = server.client
        for _ in range(10):
            job = client.post("/v1/jobs", json={"prompt": "hum", "steps": 200, "seconds": 10}).json()
            after = client.post("/v1/jobs", json={"prompt": "hum", **SHORT}).json()
            while (told := client.get(job["url"]).json())["step"] < 3:
                time.sleep(0.005)
            step = client.delete(job["url"]).json()["step"]
            stopped, told = ended(client, job), ended(client, after)
            late.append(stopped["step"] - step)
            begun.append(1e3 * (told["started"] - stopped["finished"]))
            assert (stopped["status"], told["status"]) == ("cancelled", "completed")
    return [f"| cancel of a running 200-step job | the worker is free within one step | at most {max(late)} step "
            f"later; the next job begins {max(begun):.1f} ms after it |"]


def eight(args: argparse.Namespace) -> list[str]:
    """Eight requests at once against one after another, in turns."""
    body = {"prompt": "a low hum", "steps": 20, "seconds": 2.0}
    spent: dict[str, list[float]] = {name: [] for name in ("apart", "together", "apart, CPU", "together, CPU")}
    with served() as server:

        def ask(seed: int) -> None:
            with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
                client.post("/v1/audio/generate", json=body | {"seed": seed}).raise_for_status()

        def together() -> None:
            threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        ways: dict[str, Callable[[], Any]] = {"apart": lambda: [ask(seed) for seed in range(8)], "together": together}
        for turn in range(args.turns // 4 + 1):
            for name, make in ways.items():
                start, cpu = time.perf_counter(), server.cpu_seconds()
                make()
                if turn:
                    spent[name].append(time.perf_counter() - start)
                    spent[f"{name}, CPU"].append(server.cpu_seconds() - cpu)
    middle = {name: statistics.median(times) for name, times in spent.items()}
    return [f"| eight equal requests at once against one after another{kind or ', wall clock'} | not slower | "
            f"{middle[f'apart{kind}'] / middle[f'together{kind}']:.2f} times as fast |" for kind in ("", ", CPU")]


# --- many clients ----------------------------------------------------------------------------------------------------

def mixed(args: argparse.Namespace) -> list[str]:
    """Many requests from many clients."""
    with served("--queue", "24", "--pending", "64", "--keep-jobs", "50") as server:
        sound = server.folder / "lock"                     # a name that is not counted
        audio.write(server.folder / "x.wav", 0.1 * np.ones(8000, np.float32), 16_000).rename(sound)
        crowd = Crowd(server, args.requests, sound)
        threads = [threading.Thread(target=crowd.live, args=(number,)) for number in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in server.client.get("/v1/jobs").json()["data"]:
            server.client.delete(job["url"])
            if job["status"] in ("queued", "in_progress"):
                ended(server.client, job) if server.client.get(job["url"]).status_code == 200 else None
                server.client.delete(job["url"])
        late = server.resident()
        states = server.counted("ldm2_jobs")
        requests = server.counted("ldm2_requests")
        broken = sum(number for labels, number in requests.items() if 'status="5' in labels)
        accepted = sum(number for labels, number in requests.items() if 'status="202"' in labels)
        left, alive = server.client.get("/v1/jobs").json()["data"], server.files()
        code = server.stop()
        files = server.files()
    by = {state: sum(n for labels, n in states.items() if f'status="{state}"' in labels)
          for state in ("completed", "failed", "cancelled")}
    told = ", ".join(f"{number} {state}" for state, number in by.items())
    lost = sum(number for what, number in crowd.seen.items() if what.startswith(("lost", "answered")))
    return [
        f"| {args.requests} mixed requests from {args.clients} clients: {told}; {accepted} by `POST /v1/jobs` | none "
        f"lost, none failed | {len(left)} without an end, {by['failed']} failed, {lost} answers lost |",
        f"| the same: files left | none | {len(alive)} while it runs, {len(files)} after exit code {code} |",
        f"| the same: memory at the end against request 200 ({crowd.memory[0] / 1e6:.0f} MB) | within 5 % | "
        f"{100 * (late / crowd.memory[0] - 1):+.1f} %; {' '.join(f'{each / 1e6:.0f}' for each in crowd.memory)} MB at "
        "request 200, 400, ... |",
        f"| the same: answers 5xx | none | {broken} |"]


def hostile(args: argparse.Namespace) -> list[str]:
    """Requests that nobody should send."""
    outside, statuses = [], Counter[int]()
    with served("--api-key", "key") as server:
        for number in range(args.hostile):
            method, path, more = REQUESTS[number % len(REQUESTS)](random.Random(number))
            headers = {"authorization": "Bearer key"} | more.pop("headers", {})
            answer = server.client.request(method, path, headers=headers, **more)
            statuses[answer.status_code] += 1
            try:
                line = answer.json()["error"]["message"]
            except (ValueError, KeyError):
                line = "no JSON\n"
            if not 400 <= answer.status_code < 500 or "\n" in line or "Traceback" in line:
                outside.append((method, path, answer.status_code, answer.text[:200]))
        health = server.client.get("/health").json()["status"]
    told = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
    print(*outside, sep="\n", file=sys.stderr)
    return [f"| {args.hostile} hostile requests: {told} | 4xx with one line | {len(outside)} otherwise; the server is "
            f"{health} |"]


def kill(args: argparse.Namespace) -> list[str]:
    """kill -9 in the middle of work, and a new start."""
    errors: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name))

        def live() -> None:
            with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
                while True:
                    try:
                        client.post("/v1/audio/generate", json={"input": "hum", **SHORT}).raise_for_status()
                    except Exception as error:
                        errors["connection" if isinstance(error, httpx.TransportError) else repr(error)] += 1
                        return

        threads = [threading.Thread(target=live) for _ in range(4)]
        for thread in threads:
            thread.start()
        job = ended(server.client, server.client.post("/v1/jobs", json={"prompt": "hum", **SHORT}).json())
        time.sleep(1)
        os.kill(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        left = len(server.files())
        again = Server(Path(name))
        jobs, found = again.client.get("/v1/jobs").json()["data"], again.client.get(job["url"]).status_code
        after = len(again.files())
        code = again.stop()
        end = len(list(Path(name).iterdir()))
    told = ", ".join(f"{number} {kind}" for kind, number in errors.items())
    return [f"| kill -9 and a new start | connection errors, no leftovers taken for results | errors: {told}; {left} "
            f"files left, {after} after the start, {len(jobs)} jobs, the old one answers {found}; exit code {code}, "
            f"{end} folders at the end |"]


def client(args: argparse.Namespace) -> list[str]:
    """A client that is made from the document."""
    if args.generator is None:
        return []
    with served() as server, tempfile.TemporaryDirectory() as name:
        subprocess.run([args.generator, "generate", "--url", f"{server.address}/openapi.json", "--meta", "none",
                        "--output-path", f"{name}/made_client"], check=True, capture_output=True)
        python = Path(args.generator).with_name("python")
        done = subprocess.run([python, "-c", CLIENT, name, server.address], capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    told = "works" if done.returncode == 0 else "fails"
    return [f"| a client that openapi-python-client makes from the OpenAPI document | works | {told} |"]


PARTS = {"overhead": overhead, "cancel": cancel, "eight": eight, "mixed": mixed, "hostile": hostile, "kill": kill,
         "client": client}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=count, default=2000)
    parser.add_argument("--clients", type=count, default=32)
    parser.add_argument("--hostile", type=count, default=200)
    parser.add_argument("--turns", type=count, default=40, help="of calls that are compared (default: %(default)s)")
    parser.add_argument("--generator", metavar="PROGRAM", help="openapi-python-client, in an environment of its own")
    parser.add_argument("--only", default=",".join(PARTS), help="which of: %(default)s")
    add_out(parser)
    args = parser.parse_args(arguments)
    cpu = machine.cpu()
    lines = ["# A server with the model tiny", "", f"{cpu['name']} ({cpu['units']}), {os.cpu_count()} cores; "
             f"`python -m benchmarks.serve`.", "", "| what | bar | found |", "|---|---|---|"]
    for name in args.only.split(","):
        rows = PARTS[name](args)
        print(*rows, sep="\n", file=sys.stderr, flush=True)
        lines += rows
    text = "\n".join(lines) + "\n"
    print(text)
    print(report.write(args.out / "serve.md", text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
