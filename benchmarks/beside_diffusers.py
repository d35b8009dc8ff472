"""ldm2 and diffusers at full size, float32, same steps: seconds alternating in one process, peak memory in one each.

    python -m benchmarks.beside_diffusers [--size base|large] [--seconds 10.24] [--steps 4] [--repeats 3] [--out FILE]

Weights are random, written once into --folder (4.5 GB base, 5.9 GB large). The GEMM rate of the machine is measured in
the same run: on a machine that others use, only the ratio means something.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROMPT = "a dog barking in the rain"


def ours(folder: Path, seconds: float, steps: int) -> Callable[[], object]:
    """A function that makes one sound with ldm2."""
    import ldm2

    pipe = ldm2.load(folder, reference="diffusers")
    return lambda: pipe.generate(PROMPT, seconds=seconds, steps=steps, seed=0)


def theirs(folder: Path, seconds: float, steps: int) -> Callable[[], object]:
    """A function that makes the same sound with diffusers."""
    from tests import checkpoints

    pipe = checkpoints.diffusers_pipeline(folder)
    return lambda: pipe(PROMPT, audio_length_in_s=seconds, num_inference_steps=steps,
                        generator=torch.Generator().manual_seed(0))


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of a float32 matrix product, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(repeats)) / 1e9


def peak_memory(which: str, args: argparse.Namespace) -> float:
    """GB at the peak of a process that loads and makes one sound; memory-mapped weights that were touched count."""
    command = [sys.executable, "-m", "benchmarks.beside_diffusers", "--only", which, "--folder", str(args.folder),
               "--seconds", str(args.seconds), "--steps", str(args.steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report(args: argparse.Namespace) -> str:
    """The table as Markdown."""
    loads, runs = {}, {}
    for name, build in (("ldm2", ours), ("diffusers", theirs)):
        start = time.perf_counter()
        runs[name] = build(args.folder, args.seconds, args.steps)
        loads[name] = time.perf_counter() - start
    seconds = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):                     # the first round warms up
        for name, run in runs.items():
            spent = timed(run)
            if repeat:
                seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ldm2"], seconds["diffusers"])]
    memory = {name: peak_memory(name, args) for name in runs}
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"matrix product {gemm_rate():.0f} GFLOP/s; {args.size}, {args.seconds} s of sound, {args.steps} steps, "
        "float32",
        "",
        f"`python -m benchmarks.beside_diffusers --size {args.size} --seconds {args.seconds} --steps {args.steps} "
        f"--repeats {args.repeats}`",
        "",
        "| | load s | generate s (median) | peak memory GB |",
        "|---|---|---|---|",
        *(f"| {name} | {loads[name]:.2f} | {median[name]:.2f} | {memory[name]:.2f} |" for name in runs),
        "",
        f"diffusers / ldm2, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
        f"median {statistics.median(ratios):.2f}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=None, help="checkpoint, written if it is not there")
    parser.add_argument("--size", choices=("base", "large"), default="base")
    parser.add_argument("--seconds", type=float, default=10.24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--only", choices=("ldm2", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        args.folder = Path("build") / f"random-{args.size}"
    if not args.folder.exists():
        from benchmarks import full_size

        full_size.save(args.folder, args.size)
    if args.only:
        {"ldm2": ours, "diffusers": theirs}[args.only](args.folder, args.seconds, args.steps)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    table = report(args)
    print(table)
    if args.out is not None:
        args.out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
