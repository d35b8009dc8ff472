"""ldm2 batch under fire, and its speed: the model tiny, many rows, workers and jobs that are killed.

    python -m benchmarks.batch [--rows 1000] [--steps 10] [--seconds 1] [--every 20] [--kills 3] [--out FILE.md]

1. speed: the rows in one process and in two, against a loop of `generate` in one process; the same number of cores each
2. kill -9 of a random worker every so many seconds, and of the whole job some times: each id once, files as undisturbed
3. resume: how long a second run takes when all is done

Prints a Markdown table. On a machine that others use, only ratios of speeds mean something.
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
from collections.abc import Iterator
from pathlib import Path

import soundfile

from benchmarks.arguments import count
from ldm2.batch import manifest
from ldm2.batch.local import Folder

PROMPTS = ("a rising sweep", "low hum", "a high tone", "white noise", "a dog barking", "wind", "rain", "clapping")
FIRST = 16                                 # rows of the first batches of two workers
LOOP = """
import json, sys, time
from pathlib import Path
import ldm2
from ldm2.batch.rows import seed_of
pipe = ldm2.load("tiny")
pipe.generate("x", steps=1, seconds=1)
start = time.perf_counter()
for line in Path(sys.argv[1]).read_text().splitlines():
    row = json.loads(line)
    name = row.pop("id")
    pipe.generate(**row, seed=seed_of(name)).save(Path(sys.argv[2]) / f"{name}.flac")
print(time.perf_counter() - start)
"""


def start(table: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    """Start `ldm2 batch`."""
    command = [sys.executable, "-m", "ldm2", "batch", str(table), "-o", str(folder), "--model", "tiny", "-q"]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)


def run(table: Path, folder: Path, *arguments: str) -> float:
    """Run `ldm2 batch` to its end -> seconds, loading included. Raises RuntimeError if it fails."""
    begun = time.perf_counter()
    process = start(table, folder, *arguments)
    out = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"ldm2 batch failed: {out}")
    return time.perf_counter() - begun


def working(folder: Path) -> float:
    """Seconds that the rows of a job took, from when each worker had its first batch through, in proportion."""
    times = sorted(path.stat().st_mtime for path in (folder / "audio").rglob("*.flac"))
    return (times[-1] - times[FIRST - 1]) * len(times) / (len(times) - FIRST)


def disturbed(table: Path, folder: Path, every: float, kills: int) -> tuple[int, int]:
    """Run a job of two workers to its end, killing a worker every `every` seconds and the job `kills` times.

    Returns how many workers and how many jobs were killed.
    """
    workers = jobs = 0
    while True:
        process, begun = start(table, folder, "--workers", "2", "--batch", "1"), time.monotonic()
        while process.poll() is None:
            time.sleep(every)
            if jobs < kills and time.monotonic() - begun > 2 * every:
                process.send_signal(signal.SIGKILL)
                jobs += 1
            elif members := list(_workers(process.pid)):
                os.kill(random.choice(members), signal.SIGKILL)
                workers += 1
        process.wait()
        if process.returncode == 0:
            return workers, jobs
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the job ended with exit code {process.returncode}, though nobody killed it")


def _workers(pid: int) -> Iterator[int]:
    """The processes of a job's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        line = Path(f"/proc/{child}/cmdline")
        if line.exists() and b"spawn_main" in line.read_bytes():
            yield int(child)


def differences(one: Path, other: Path) -> list[str]:
    """What two folders do not have in common: ids, files, samples."""
    found = []
    ids = [[json.loads(line)["id"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
           for folder in (one, other)]
    if ids[0] != ids[1] or len(set(ids[0])) < len(ids[0]):
        found.append("the ids differ")
    files = [{path.relative_to(folder) for path in (folder / "audio").rglob("*") if path.is_file()}
             for folder in (one, other)]
    found += [f"only one has {path}" for path in files[0] ^ files[1]]
    for path in files[0] & files[1]:
        samples = [soundfile.read(folder / path)[0] for folder in (one, other)]
        if samples[0].tobytes() != samples[1].tobytes():
            found.append(f"{path} differs")
    return found


def main() -> int:
    """Run the measurements. Returns 1 if a disturbed job is not equal to an undisturbed one."""
    parse = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parse.add_argument("--rows", type=count, default=1000)
    parse.add_argument("--steps", type=count, default=10)
    parse.add_argument("--seconds", type=float, default=1.0, help="of each sound")
    parse.add_argument("--every", type=float, default=20.0, help="seconds between kills of a worker")
    parse.add_argument("--kills", type=int, default=3, help="of the whole job")
    parse.add_argument("--out", help="file for the table")
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "rows.jsonl"
        table.write_text("".join(json.dumps({
            "id": f"r{row}", "prompt": PROMPTS[row % len(PROMPTS)], "steps": args.steps, "seconds": args.seconds,
        }) + "\n" for row in range(args.rows)))
        lines, faults = measure(table, folder, args)
    text = "\n".join(lines)
    print(text, *faults, sep="\n")
    if args.out:
        Path(args.out).write_text(text + "\n")
    return 1 if faults else 0


def measure(table: Path, folder: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The lines of the table, and what is wrong."""
    lines = [f"`python -m benchmarks.batch --rows {args.rows} --steps {args.steps} --seconds {args.seconds:g} --every "
             f"{args.every:g} --kills {args.kills}`, model tiny, {os.cpu_count()} cores.", "",
             "| what | rows a minute | against the loop |", "|---|---|---|"]
    (folder / "loop").mkdir()
    loop = float(subprocess.run([sys.executable, "-c", LOOP, str(table), str(folder / "loop")], check=True,
                                capture_output=True, text=True,
                                env=os.environ | {"OMP_WAIT_POLICY": "passive"}).stdout)     # as the command line
    lines.append(f"| loop of `generate`, one process | {60 * args.rows / loop:.0f} | 1.00 |")
    for words, name, arguments in (
        ("`ldm2 batch`, 1 worker, all threads", "1x2", ()),
        ("`ldm2 batch --batch 1 --workers 2`", "one", ("--batch", "1", "--workers", "2")),
        ("`ldm2 batch --workers 2`", "2x1", ("--workers", "2")),
    ):
        run(table, folder / name, *arguments)
        seconds = working(folder / name)
        lines.append(f"| {words} | {60 * args.rows / seconds:.0f} | {loop / seconds:.2f} |")
    again = run(table, folder / "2x1", "--workers", "2")
    lines += ["", f"A second run over these {args.rows} rows takes {again:.1f} s, start of Python included.", ""]
    workers, jobs = disturbed(table, folder / "killed", args.every, args.kills)
    faults = differences(folder / "one", folder / "killed")
    lines.append(f"With {workers} workers and {jobs} whole jobs killed (SIGKILL), the folder has "
                 f"{len(manifest.settled(Folder(folder / 'killed')))} rows done; differences from an undisturbed one: "
                 f"{len(faults) or 'none'}.")
    return lines, faults


if __name__ == "__main__":
    sys.exit(main())
