"""The command `ldm2 profile`: where time and memory go, for a model, a length, a dtype and a device."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from ldm2 import __version__, atomic
from ldm2.cli import options
from ldm2.options import check_integer
from ldm2.settings import Settings

if TYPE_CHECKING:
    from ldm2.pipeline import AudioLDM2
    from ldm2.runtime.profiling import Limits, Measured, Operation

RANDOM = ("tiny", "audioldm2", "audioldm2-large")
PROMPT = "a dog barking in the rain"
TOP = 10


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser("profile", help="measure where time and memory go", description="Time, FLOP, share "
                                  "of the machine's limit and memory of each stage, and the most expensive operations.")
    options.add_model_options(command)
    command.add_argument("--random", choices=RANDOM, help="a model of this size with random weights instead of --model:"
                         " nothing is downloaded")
    command.add_argument("--seconds", type=float, help="length of the sound (default: the model's own)")
    command.add_argument("--steps", type=int, help="sampler steps of the generation that is added up (default: the "
                         "model's own)")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sounds at once (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each stage, of which the "
                         "median counts (default: %(default)s)")
    command.add_argument("--trace", metavar="FILE.json", help="write a trace of each stage once, for chrome://tracing "
                         "or ui.perfetto.dev")
    command.add_argument("--overwrite", action="store_true", help="replace the trace if it exists")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run, verbose=False, model=None)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    trace = None if args.trace is None else check_trace(args.trace, args.overwrite)
    check_integer("repeats", args.repeats)
    check_integer("batch", args.batch)
    given = Settings(PROMPT, seconds=args.seconds, steps=args.steps, num_waveforms=args.batch, seed=0)
    given.resolved()                                       # a wrong value is refused before gigabytes are loaded
    if args.low_memory:
        raise ValueError("--low-memory cannot be profiled: the parts have to be in memory")
    from ldm2.runtime import profiling

    pipe = _pipeline(args)
    settings = given.resolved(pipe.defaults)
    limits = profiling.limits(pipe.device, pipe.dtype)
    works = profiling.works(pipe, settings)
    rows = [profiling.measure(work, pipe.device, args.repeats) for work in works]
    if trace is None:
        top = profiling.operations(works, pipe.device)
    else:
        with atomic.whole(trace, args.overwrite) as temporary:
            top = profiling.operations(works, pipe.device, temporary)
    about = _about(pipe, settings.seconds, settings.steps, args.batch)
    if args.json:
        print(json.dumps(as_json(about, limits, rows, top) | {"trace": args.trace}, indent=1))
        return
    print(table(about, limits, rows, top))
    if trace is not None:
        print(trace)


def check_trace(path: str | Path, overwrite: bool) -> Path:
    """The path, if a trace may be written there. Raises ValueError for another suffix than .json, OSError if not."""
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ValueError(f"a trace is a .json file, got {str(path)!r}")
    atomic.check_writable(path, overwrite)
    return path


def _pipeline(args: argparse.Namespace) -> AudioLDM2:
    """The checkpoint, or a random model."""
    from ldm2.checkpoints import random_models
    from ldm2.runtime.compilation import check_compiler, compile_step
    from ldm2.runtime.device import choose_device

    if args.random is None:
        args.model = args.model or options.DEFAULT_MODEL
        return options.load(args)
    for name in ("model", "revision", "variant", "tokenizers"):
        if getattr(args, name) is not None:
            raise ValueError(f"--random {args.random} and --{name} {getattr(args, name)} exclude each other")
    device = choose_device(args.device)
    if args.compile:
        check_compiler(device)
    pipe = random_models.pipeline(args.random, device=device, dtype=args.dtype, reference=args.reference)
    if args.compile:
        compile_step(pipe.unet)
    return pipe


def _about(pipe: AudioLDM2, seconds: float, steps: int, batch: int) -> dict:
    """What was measured, where."""
    import torch

    name = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else platform.machine()
    return pipe.origin | {
        "device": str(pipe.device), "machine": name, "threads": torch.get_num_threads(), "seconds": seconds,
        "steps": steps, "batch": batch, "ldm2": __version__, "torch": torch.__version__,
    }


def as_json(about: dict, limits: Limits, rows: list[Measured], top: list[Operation]) -> dict:
    """Everything as plain values: seconds, FLOP, bytes."""
    return {
        "about": about, "flop_rate": limits.flop_rate, "copy_rate": limits.copy_rate,
        "stages": [
            vars(row) | {"flop_rate": row.flop_rate, "share": row.flop_rate / limits.flop_rate} for row in rows
        ],
        "seconds": sum(row.calls * row.seconds for row in rows),
        "operations": [vars(operation) for operation in top],
    }


def table(about: dict, limits: Limits, rows: list[Measured], top: list[Operation]) -> str:
    """The measurements as a table for people."""
    total = sum(row.calls * row.seconds for row in rows)
    lines = [
        f"{about['model']}, {about['dtype']} on {about['device']} ({about['machine']}, {about['threads']} threads), "
        f"{about['batch']} x {about['seconds']:g} s, {about['steps']} steps",
        f"limits measured now: matrix product {limits.flop_rate / 1e9:.0f} GFLOP/s, "
        f"copy {limits.copy_rate / 1e9:.1f} GB/s", "",
        f"{'stage':<20}{'ms':>10} {'calls':>6}{'share':>7}{'GFLOP':>9}{'GFLOP/s':>9}{'of limit':>9}{'weights':>10}"
        f"{'memory':>10}",
    ]
    for row in rows:
        share = row.calls * row.seconds / total
        limit = f"{row.flop_rate / limits.flop_rate:.2f}" if row.flop else "-"
        memory = "-" if row.memory is None else f"{row.memory / 1e6:.0f} MB"
        lines.append(
            f"{row.name:<20}{1e3 * row.seconds:>10.2f}{'*' if row.is_wide else ' '}{row.calls:>6}{share:>7.1%}"
            f"{row.flop / 1e9:>9.2f}{row.flop_rate / 1e9:>9.1f}{limit:>9}{row.weights / 1e6:>7.0f} MB{memory:>10}"
        )
    lines.append(f"{'all':<20}{1e3 * total:>10.2f}")
    if any(row.is_wide for row in rows):
        lines.append("* repetitions differ by more than 15 %: the machine is busy, or the stage is too short to tell")
    busy = sum(operation.seconds for operation in top)
    lines += ["", f"{'operation':<60}{'calls':>8}{'ms':>10}{'share':>7}"]
    lines += [
        f"{operation.name[:58]:<60}{operation.calls:>8}{1e3 * operation.seconds:>10.2f}{operation.seconds / busy:>7.1%}"
        for operation in top[:TOP]
    ]
    return "\n".join(lines)
