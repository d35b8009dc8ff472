"""ldm2 and diffusers side by side, full size, random weights: the variants of each row alternate in one process.

    python -m benchmarks [--device cpu|cuda] [--dtype float32] [--rows unet,vae,...] [--steps 20] [--repeats 3]

Prints a Markdown table and writes it with JSON and a plot under --out. Both sides read one checkpoint, written once
into --folder (4.5 GB base, 5.9 GB large), and compute the same function (reference="diffusers"). Where diffusers is not
installed, ldm2 runs alone. A variant that fails is reported as failed, and the others continue. On a machine that
others use, only the ratios of speeds mean something.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ldm2
from benchmarks import report, timing
from benchmarks.arguments import add_out, count, positive
from benchmarks.bench import Bench
from benchmarks.rows import COMPILED, PROMPT, SUBJECTS
from benchmarks.timing import Timed
from ldm2.checkpoints import random_models
from ldm2.pipeline import AudioLDM2
from ldm2.runtime import memory, profiling
from ldm2.runtime.device import choose_device, choose_dtype, chosen_name, computing_dtype, dtype_name

SIZES = {"base": "audioldm2", "large": "audioldm2-large", "tiny": "tiny"}
PROCESSES = ("ldm2", "ldm2, low_memory", "diffusers")
ROWS = (*SUBJECTS, "memory")
ALONE_STEPS = 4                                            # the third is recorded as a CUDA graph


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="float32, float16, bfloat16, int8, w8a8 "
                        "(default: float16 on cuda)")
    parser.add_argument("--their-dtype", help="of diffusers (default: the same; float32 beside int8)")
    parser.add_argument("--threads", type=count, help="of torch on the CPU")
    parser.add_argument("--rows", default=",".join(name for name in ROWS if name not in COMPILED),
                        help=f"which of: %(default)s,{','.join(COMPILED)} (default: all but the last {len(COMPILED)})")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--seconds", type=positive, default=10.24)
    parser.add_argument("--steps", type=count, help="of the generation (default: 20, on cuda 200)")
    parser.add_argument("--sweep-steps", type=count, help="for each length and batch (default: 2, on cuda 20)")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--no-diffusers", action="store_true", help="ldm2 alone, which needs no checkpoint")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its convolutions and choose")
    parser.add_argument("--folder", type=Path, help="checkpoint, written if it is not there (default: build/random-*)")
    add_out(parser)
    parser.add_argument("--name", help="of the files there (default: device, dtype and size)")
    parser.add_argument("--only", choices=PROCESSES, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 where nothing could be measured."""
    parser = options()
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.rows.split(",")) - set(ROWS))
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}, choose from {', '.join(ROWS)}")
    try:
        device = choose_device(args.device)
        dtype = chosen_name(args.dtype, device)
        their_dtype = choose_dtype(args.their_dtype or dtype, device)
        their_dtype = computing_dtype(their_dtype) if args.their_dtype is None else their_dtype
        if their_dtype == torch.int8:
            raise ValueError("diffusers has no int8: choose another --their-dtype")
    except ValueError as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    fast = device.type == "cuda"
    args.steps = args.steps or (200 if fast else 20)
    args.sweep_steps = args.sweep_steps or (20 if fast else 2)
    folder = None if args.no_diffusers else checkpoint(args)
    if args.only is not None:
        print(alone(args.only, args.seconds, folder, device, dtype, their_dtype))
        return 0
    return run(args, folder, device, dtype, their_dtype)


def run(args: argparse.Namespace, folder: Path | None, device: torch.device, dtype: str,
        their_dtype: torch.dtype) -> int:
    """All rows in this process, then the processes of their own."""
    asked = args.rows.split(",")
    limits = profiling.limits(device, computing_dtype(choose_dtype(dtype, device)))
    subjects = [name for name in asked if name in SUBJECTS]
    bench = Bench(*pipelines(args, folder, device, dtype, their_dtype), folder, args.seconds, args.steps,
                  args.sweep_steps, their_dtype) if subjects else None
    rows = []
    for subject in subjects:
        for timed in measured(subject, bench, args.repeats):
            found = report.rows(timed, limits)
            tell(*map(report.line, found))
            rows += found
    processes = {}
    for name in PROCESSES if "memory" in asked and folder is not None else ():
        other = name == "diffusers" and dtype_name(their_dtype) != dtype
        title = f"{name}, {dtype_name(their_dtype)}" if other else name
        processes[title] = apart(name, args)
        tell(report.process_line(title, processes[title]))
    why = "left out" if args.no_diffusers else "not installed, or wrote no checkpoint"
    notes = [] if folder is not None else [f"diffusers is {why}: its rows, loading and memory are missing."]
    settings = {name: getattr(args, name) for name in ("size", "seconds", "steps", "sweep_steps", "repeats")}
    settings |= {"dtype": dtype, "their_dtype": dtype_name(their_dtype)}
    about = report.about(shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), device, settings)
    return publish(args, about, limits, rows, processes, notes)


def measured(subject: str, bench: Bench, repeats: int) -> Iterator[list[Timed]]:
    """The rows of a subject one by one; where it fails between them, that in place of the rest."""
    rest = Timed(subject, subject, "all that is left")
    with timing.attempt(rest):
        for row in SUBJECTS[subject](bench):
            tell(f"{row.name} ...")
            yield timing.measure(row, bench.device, repeats, at_least=0.5 if bench.device.type == "cuda" else 0.0)
    if rest.error is not None:
        yield [rest]


def tell(*lines: str) -> None:
    """Results as they come, so that a run that is stopped has told what it found."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def publish(args: argparse.Namespace, about: dict, limits: profiling.Limits, rows: list[dict],
            processes: report.Processes, notes: list[str]) -> int:
    """Print the tables and write the files."""
    name = args.name or f"{about['device'].partition(':')[0]}-{about['dtype']}-{args.size}"
    try:
        report.plot(args.out / f"{name}.png", rows)
    except ImportError:
        notes = [*notes, 'No plot: it needs matplotlib (pip install matplotlib).']
    table = report.markdown(about, limits, rows, processes, notes)
    report.write(args.out / f"{name}.json", report.to_json(about, limits, rows, processes, notes))
    print(table)
    print(report.write(args.out / f"{name}.md", table + "\n"))
    return int(bool(rows) and all("error" in row for row in rows))


def checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder that both sides read; None where diffusers, which writes it, is not installed or fails."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    if args.size == "tiny":
        return Path(ldm2.__file__).parent / "tiny"
    folder = args.folder or Path("build") / f"random-{args.size}"
    if not folder.exists():
        try:
            from benchmarks import full_size

            full_size.save(folder, args.size)
        except Exception:                                  # what diffusers meets in unlike libraries costs ldm2 nothing
            traceback.print_exc()
            return None
    return folder


def pipelines(args: argparse.Namespace, folder: Path | None, device: torch.device, dtype: str,
              their_dtype: torch.dtype) -> tuple[AudioLDM2, Callable[[], Any] | None]:
    """Ours, and what loads diffusers'."""
    if folder is None:
        return random_models.pipeline(SIZES[args.size], device=device, dtype=dtype, reference="diffusers"), None
    ours = ldm2.load(folder, reference="diffusers", device=str(device), dtype=dtype)
    return ours, lambda: diffusers_pipeline(folder, device, their_dtype)


def diffusers_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' side; imported here, so that a version that does not even import costs ldm2 nothing."""
    from benchmarks import checkpoints

    return checkpoints.diffusers_pipeline(folder, dtype).to(device)


def alone(name: str, seconds: float, folder: Path, device: torch.device, dtype: str, their_dtype: torch.dtype) -> int:
    """Load and make one sound of a few steps with one of PROCESSES; the peak of memory in bytes."""
    if name == "diffusers":
        pipe = diffusers_pipeline(folder, device, their_dtype)
        pipe(PROMPT, audio_length_in_s=seconds, num_inference_steps=ALONE_STEPS,
             generator=torch.Generator().manual_seed(0))
    else:
        low = name == "ldm2, low_memory"
        pipe = ldm2.load(folder, reference="diffusers", device=str(device), dtype=dtype, low_memory=low)
        pipe.generate(PROMPT, seconds=seconds, steps=ALONE_STEPS, seed=0)
    return memory.peak_bytes(device)


def apart(name: str, args: argparse.Namespace) -> float | str:
    """`alone` in a process of its own, which tells on stderr what goes wrong: its result, or that it failed."""
    command = [sys.executable, "-m", "benchmarks", "--only", name]
    for option in ("size", "seconds", "device", "dtype", "their_dtype", "threads", "folder"):
        value = getattr(args, option)
        command += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    command += ["--cudnn-benchmark"] if args.cudnn_benchmark else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return f"failed with exit code {done.returncode}" if done.returncode else float(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
