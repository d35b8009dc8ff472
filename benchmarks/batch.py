"""ldm2 batch under fire, and its speed: the model tiny, many rows, workers and jobs that are killed, a full disk.

    python -m benchmarks.batch [speed kills shards ray dry-run resume hostile full-disk] [--rows 1000] [--steps 10]
                               [--seconds 1] [--every 20] [--kills 3] [--out FOLDER]

speed      rows a minute of a loop of `generate`, of one process, of two with a thread each, and of what is chosen
kills      SIGKILL for a random worker every so many seconds, and for the whole job: each id once, files as undisturbed
shards     four quarters together are one run
ray        two actors, one of which is killed
dry-run    a million rows
resume     100,000 rows that are done
hostile    30 rows of all kinds of nonsense among three good ones
full-disk  a small file system that is full in the middle (Linux, root)

Prints a Markdown table and writes it to FOLDER/batch.md. On a machine that others use, only ratios of speeds mean
something, and CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from benchmarks import hostile_rows
from benchmarks.arguments import add_out, count
from ldm2.batch import job as jobs
from ldm2.batch import manifest
from ldm2.batch.local import Folder
from ldm2.batch.rows import MANIFEST
from ldm2.runtime import machine

PROMPTS = ("a rising sweep", "low hum", "a high tone", "white noise", "a dog barking", "wind", "rain", "clapping")
FIRST = 16                                 # rows of the first batches of two workers
LOOP = """
import json, sys, time
from pathlib import Path
import ldm2
from ldm2.batch.rows import seed_of
pipe = ldm2.load("tiny")
pipe.generate("x", steps=1, seconds=1)
start = time.perf_counter(), time.process_time()
for line in Path(sys.argv[1]).read_text().splitlines():
    row = json.loads(line)
    name = row.pop("id")
    pipe.generate(**row, seed=seed_of(name)).save(Path(sys.argv[2]) / f"{name}.flac")
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""
RAY = """
import os, subprocess, sys, threading, time
from pathlib import Path
import ray
from ldm2.cli.commands import main
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
def kill():
    while not list(Path(sys.argv[2]).glob("audio/*/*")):
        time.sleep(0.1)
    pids = subprocess.run(["pgrep", "ray::MapWorker"], capture_output=True, text=True).stdout.split()
    os.kill(int(pids[0]), 9)
    print("killed", pids[0], file=sys.stderr)
threading.Thread(target=kill, daemon=True).start()
code = main(["batch", sys.argv[1], "-o", sys.argv[2], *"--model tiny -q --batch 1 --workers 2 --ray".split()])
ray.shutdown()
sys.exit(code)
"""


@dataclass
class Bench:
    """Where it runs and with what, and what has been found: rows of the table, and what is wrong."""

    args: argparse.Namespace
    folder: Path
    lines: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def table(self, rows: int) -> Path:
        """A table of so many rows."""
        path = self.folder / f"rows-{rows}.jsonl"
        if not path.exists():
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": f"r{row}", "prompt": PROMPTS[row % len(PROMPTS)],
                                            "steps": self.args.steps, "seconds": self.args.seconds}) + "\n"
                                for row in range(rows))
        return path

    def tell(self, what: str, found: str) -> None:
        """A row of the results."""
        print(f"{what}: {found}", file=sys.stderr)
        self.lines.append((what, found))

    def fault(self, what: str) -> None:
        """Something that must not be."""
        print(f"FAULT: {what}", file=sys.stderr)
        self.faults.append(what)


def command(table: Path, folder: Path, *arguments: str) -> list[str]:
    """`ldm2 batch`."""
    return [sys.executable, "-m", "ldm2", "batch", str(table), "-o", str(folder), "--model", "tiny", "-q", *arguments]


def run(*words: str) -> tuple[int, str, float, float, float]:
    """Run a command to its end -> exit code, what it printed, seconds, CPU seconds and peak memory (MB) with all of
    its children."""
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.stdout.read() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, out, time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def done(bench: Bench, name: str, *arguments: str, rows: int | None = None) -> tuple[Path, float]:
    """A folder with a job that was run to its end, and the CPU seconds that it took."""
    folder, mark = bench.folder / name, bench.folder / f"{name}.cpu"
    if not mark.exists():
        code, out, _, used, _ = run(*command(bench.table(rows or bench.args.rows), folder, *arguments))
        if code:
            raise RuntimeError(f"ldm2 batch failed: {out}")
        mark.write_text(f"{used}")
    return folder, float(mark.read_text())


def working(folder: Path) -> float:
    """Seconds that the rows of a job took, from when each worker had its first batch through, in proportion."""
    times = sorted(path.stat().st_mtime for path in (folder / "audio").rglob("*.flac"))
    return (times[-1] - times[FIRST - 1]) * len(times) / (len(times) - FIRST)


def speed(bench: Bench) -> None:
    """Rows a minute, and against the loop."""
    rows = bench.args.rows
    (bench.folder / "loop").mkdir()
    loop = subprocess.run([sys.executable, "-c", LOOP, str(bench.table(rows)), str(bench.folder / "loop")], check=True,
                          capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    seconds, used = map(float, loop.stdout.split())
    bench.tell("loop of `generate`, one process", f"{60 * rows / seconds:.0f} rows a minute, {1e3 * used / rows:.0f} "
               f"ms of CPU a row")
    for words, name, arguments in (
        (f"1 process x {machine.cores()} threads", "1xall", ("--workers", "1")),
        ("2 processes x half of the threads each", "2xhalf", ("--workers", "2")),
        ("what is chosen", "chosen", ()),
    ):
        folder, used = done(bench, name, *arguments)
        bench.tell(words, f"{60 * rows / working(folder):.0f} rows a minute, {seconds / working(folder):.2f} times the "
                   f"loop; {1e3 * used / rows:.0f} ms of CPU a row, loading included")


def kills(bench: Bench) -> None:
    """A job of two workers to its end, through all kills."""
    workers = whole = 0
    folder, args = bench.folder / "killed", bench.args
    while True:
        process, begun = subprocess.Popen(
            command(bench.table(args.rows), folder, "--workers", "2", "--batch", "1"), stdout=subprocess.DEVNULL,
            start_new_session=True), time.monotonic()
        while process.poll() is None:
            time.sleep(args.every)
            if whole < args.kills and time.monotonic() - begun > 2 * args.every:
                process.send_signal(signal.SIGKILL)
                whole += 1
            elif members := list(_workers(process.pid)):
                os.kill(random.choice(members), signal.SIGKILL)
                workers += 1
        if process.wait() == 0:
            break
        if process.returncode != -signal.SIGKILL:
            bench.fault(f"the job ended with exit code {process.returncode}, though nobody killed it")
            return
    one, _ = done(bench, "one", "--batch", "1", "--workers", "2")
    same(bench, one, folder)
    bench.tell(f"{args.rows} rows, {workers} workers and {whole} whole jobs killed",
               f"{len(manifest.settled(Folder(folder)))} rows done, files as undisturbed")


def _workers(pid: int) -> Iterator[int]:
    """The processes of a job's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        line = Path(f"/proc/{child}/cmdline")
        if line.exists() and b"spawn_main" in line.read_bytes():
            yield int(child)


def shards(bench: Bench) -> None:
    """Four quarters in any order."""
    rows = max(8, bench.args.rows // 10)
    one, _ = done(bench, "whole", "--batch", "1", rows=rows)
    for number in (3, 1, 4, 2):
        code, out, *_ = run(*command(bench.table(rows), bench.folder / "quarters", "--batch", "1", "--shard",
                                     f"{number}/4"))
        if code:
            bench.fault(f"shard {number}/4 failed: {out}")
    same(bench, one, bench.folder / "quarters")
    bench.tell(f"{rows} rows in shards 3/4, 1/4, 4/4, 2/4", "same set and bytes as one run")


def ray(bench: Bench) -> None:
    """Two actors, one of them killed."""
    rows = max(40, bench.args.rows // 10)
    one, _ = done(bench, "alone", "--batch", "1", "--workers", "2", rows=rows)
    code, out, *_ = run(sys.executable, "-c", RAY, str(bench.table(rows)), str(bench.folder / "ray"))
    if code or "killed" not in out:
        bench.fault(f"the job on Ray failed, or no actor was killed: {out[-500:]}")
        return
    same(bench, one, bench.folder / "ray")
    bench.tell(f"Ray: {rows} rows, 2 actors, one of them killed", "same set and bytes as the local run")


def dry_run(bench: Bench) -> None:
    """A million rows."""
    table = bench.table(1_000_000)
    code, out, seconds, used, memory = run(*command(table, bench.folder / "dry", "--dry-run"))
    table.unlink()
    if code or "1000000 rows" not in out or memory > 500:
        bench.fault(f"the dry run failed, or took too much: exit code {code}, {memory:.0f} MB, {out[-500:]}")
    bench.tell("1,000,000 rows --dry-run", f"{seconds:.0f} s ({used:.0f} s of CPU), {memory:.0f} MB")


def resume(bench: Bench) -> None:
    """Many finished rows: files of 100 bytes, which nothing but their size is looked at of."""
    rows, folder = 100_000, bench.folder / "finished"
    table = bench.table(rows)
    load = {name: "auto" for name in ("device", "dtype")} | {"reference": "authors"}
    job = jobs.Job(table, str(folder), "tiny", load)
    jobs.open_place(job, []).close()
    with open(folder / "manifest-1of1-0.jsonl", "w", encoding="utf-8") as lines:
        for row in job.rows({}):
            path = folder / f"{row.path}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * 100)
            lines.write(json.dumps(dict.fromkeys(MANIFEST) | {
                "id": row.id, "path": f"{row.path}.flac", "status": manifest.OK, "bytes": 100, "asked": row.asked,
                "ms": 100.0, "line": row.line, "prompt": row.options["prompt"]}) + "\n")
    code, out, seconds, used, memory = run(*command(table, folder, "--dry-run"))
    if code or f"{rows} done" not in out:
        bench.fault(f"not all rows are known to be done: {out[-500:]}")
    bench.tell(f"{rows} finished rows, until what is left is known", f"{seconds:.1f} s ({used:.1f} s of CPU, start of "
               f"Python included), {memory:.0f} MB")
    code, out, seconds, used, _ = run(*command(table, folder))
    if code or f"{rows} were done before, 0 done now" not in out:
        bench.fault(f"not all rows are known to be done: {out[-500:]}")
    bench.tell(f"{rows} finished rows, whole second run with its manifests", f"{seconds:.1f} s ({used:.1f} s of CPU)")


def nonsense(bench: Bench) -> None:
    """Hostile rows, each an error of its own, the good ones done, nothing outside."""
    place = bench.folder / "hostile"
    place.mkdir()
    good, bad = hostile_rows.write(place / "rows.jsonl", 3)
    code, out, *_ = run(*command(place / "rows.jsonl", place / "out"))
    for fault in hostile_rows.faults(place, good, bad, code, out):
        bench.fault(fault)
    bench.tell(f"{len(bad)} hostile rows among {good}", "each an error with its line, the others done, nothing outside")


def full_disk(bench: Bench) -> None:
    """A file system that is full in the middle, then is not."""
    place, rows = bench.folder / "small", 100
    place.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)],
                                                 capture_output=True).returncode:
        bench.tell("disk full in the middle", "not run: a small file system needs Linux and root")
        return
    try:
        code, out, *_ = run(*command(bench.table(rows), place / "out", "--batch", "1"))
        before = len(manifest.settled(Folder(place / "out")))
        if code != 1 or out.count("\n") != 1 or ("disk" not in out and "space" not in out):
            bench.fault(f"a full disk ended with exit code {code} and {out!r}")
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
        again, told, *_ = run(*command(bench.table(rows), place / "out", "--batch", "1"))
        if again or f"{before} were done before, {rows - before} done now" not in told:
            bench.fault(f"the job was not completed: {told}")
    finally:
        subprocess.run(["umount", str(place)], check=True)
    bench.tell(f"disk full after {before} of {rows} rows", f"exit code {code}, one line; a second run completes")


def same(bench: Bench, one: Path, other: Path) -> None:
    """Note what two folders do not have in common: ids, files, samples."""
    ids = [[json.loads(line)["id"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
           for folder in (one, other)]
    if ids[0] != ids[1] or len(set(ids[0])) < len(ids[0]):
        bench.fault(f"the ids of {one.name} and {other.name} differ")
    files = [{path.relative_to(folder) for path in (folder / "audio").rglob("*") if path.is_file()}
             for folder in (one, other)]
    for path in files[0] ^ files[1]:
        bench.fault(f"only one of {one.name} and {other.name} has {path}")
    for path in files[0] & files[1]:
        if soundfile.read(one / path)[0].tobytes() != soundfile.read(other / path)[0].tobytes():
            bench.fault(f"{path} differs between {one.name} and {other.name}")


PARTS: dict[str, Callable[[Bench], None]] = {
    "speed": speed, "kills": kills, "shards": shards, "ray": ray, "dry-run": dry_run, "resume": resume,
    "hostile": nonsense, "full-disk": full_disk,
}


def main() -> int:
    """Run the measurements. Returns 1 if something is not as it must be."""
    parse = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parse.add_argument("parts", nargs="*", choices=[[], *PARTS], help="what to run (default: everything)")
    parse.add_argument("--rows", type=count, default=1000)
    parse.add_argument("--steps", type=count, default=10)
    parse.add_argument("--seconds", type=float, default=1.0, help="of each sound")
    parse.add_argument("--every", type=float, default=20.0, help="seconds between kills of a worker")
    parse.add_argument("--kills", type=int, default=3, help="of the whole job")
    add_out(parse)
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args, Path(name))
        for part in args.parts or PARTS:
            PARTS[part](bench)
    text = "\n".join([
        f"{machine.cpu()['name']}, {machine.cores()} cores, torch {machine.version('torch')}, model tiny", "",
        f"`python -m benchmarks.batch {' '.join(args.parts)} --rows {args.rows} --steps {args.steps} --seconds "
        f"{args.seconds:g} --every {args.every:g} --kills {args.kills}`", "", "| what | found |", "|---|---|",
        *(f"| {what} | {found} |" for what, found in bench.lines), *(f"\nFAULT: {fault}" for fault in bench.faults)])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "batch.md").write_text(text + "\n")
    print(text)
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
