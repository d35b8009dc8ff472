"""What int8 weights, and inputs of 8 bits beside them, cost and save: `python -m benchmarks.int8` prints and writes a
table.

    python -m benchmarks.int8 [--rows memory,speed,latents,judge] [--size base|large|tiny] [--steps 20] [--seeds 6]

memory: processes of their own load a full-size model (random weights, written once into --folder: 1.1 GB base) and make
one sound of 10.24 s; the peak of each. speed: a step of the UNet for 10.24 s and two branches of guidance, the dtypes
in turn. latents: of int8 and w8a8, relative to float32's after the same steps, full size and tiny. judge: the share of
tiny's sounds that the judge of `benchmarks.judge` hears as what was asked for, 36 for each of --seeds, and how much it
differs from that of float32's sounds of the same seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ldm2
from benchmarks import report, timing, tiny_quality
from benchmarks.__main__ import SIZES
from benchmarks.arguments import add_out, count
from benchmarks.rows import PROMPT, SCALE
from ldm2.checkpoints import build, int8, random_models
from ldm2.checkpoints.hub import BUNDLED
from ldm2.checkpoints.writer import write_safetensors
from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.runtime import int8_layers, memory, weight_layout
from ldm2.runtime.device import W8A8, choose_dtype

SECONDS = 10.24
ROWS = ("memory", "speed", "latents", "judge")
BYTES = ("int8", W8A8)
CPU = torch.device("cpu")
PROCESSES = {"low_memory": True, "whole": False}


def write(folder: Path, size: str) -> Path:
    """A full-size checkpoint in int8 with random weights, the words of tiny; it is there when all of it is."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    index = json.loads((BUNDLED / "tiny/model_index.json").read_text())
    index.pop("feature_extractor", None)                   # these have no audio branch, and rank nothing
    for name, part in random_models.read(SIZES[size]).items():
        (partial / name).mkdir(parents=True)
        if name == "scheduler":
            shutil.copytree(BUNDLED / "tiny" / name, partial / name, dirs_exist_ok=True)
            continue
        write_safetensors(partial / name / "model.safetensors", int8.quantized(part.tensors))
        (partial / name / "config.json").write_text(json.dumps(part.fields | {int8.FIELD: "int8"}))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED / "tiny" / name, partial / name)
    (partial / "model_index.json").write_text(json.dumps(index))
    return partial.rename(folder)


def alone(folder: Path, low_memory: bool, steps: int) -> int:
    """Load and make one sound; the peak of memory in bytes."""
    pipe = ldm2.load(folder, low_memory=low_memory)
    pipe.generate(PROMPT, seconds=SECONDS, steps=steps, seed=0)
    return memory.peak_bytes(pipe.device)


def peaks(args: argparse.Namespace) -> list[dict]:
    """A row for each of PROCESSES, each in a process of its own."""
    folder = args.folder or Path("build") / f"random-{args.size}-int8"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(folder, args.size)
    rows = [{"what": "weights on the disk", "value": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
             "unit": "GB"}]
    for name in PROCESSES:
        command = [sys.executable, "-m", "benchmarks.int8", "--only", name, "--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"what": f"peak memory, {name}", "value": float(done.stdout.split()[-1]), "unit": "GB"})
        report_row(rows[-1])
    return rows


def stepper(size: str, dtype: str) -> timing.Run:
    """() -> a step of a UNet with random weights and contexts."""
    unet = build.model(random_models.read(SIZES[size])["unet"], "unet", device=CPU, dtype=choose_dtype(dtype, CPU))
    if dtype == W8A8:
        int8_layers.round_inputs(unet)
    computing = unet.conv_in.bias.dtype
    contexts = [torch.randn(2, 8, width, dtype=computing) for width in unet.config.context_widths]
    shape = 1, unet.config.in_channels, round(25 * SECONDS), 16
    with torch.inference_mode():
        state = weight_layout.arrange(unet).prepare(Conditioning(tuple(contexts), (None,) * len(contexts)))

    @torch.inference_mode()
    def step() -> Tensor:
        return unet(torch.randn(shape, dtype=computing), 500.0, state)

    return step


def speeds(args: argparse.Namespace) -> list[dict]:
    """A row for each dtype: seconds of a step, and how many times float32's speed that is."""
    names = ("bfloat16", *BYTES, "float32")
    makes = {name: functools.partial(stepper, args.size, name) for name in names}
    timed = timing.measure(timing.Row("speed", "UNet step", makes), CPU, args.repeats)
    for each in timed:
        if each.error is not None:
            raise SystemExit(f"{each.variant}: {each.error}")
    rows = [{"what": f"UNet step, {args.size}, {each.variant}", "value": each.median, "unit": "s",
             "speedup": timing.ratio(each, timed[-1])} for each in timed]
    for row in rows:
        report_row(row)
    return rows


def latents(pipe: AudioLDM2, prompt: str, steps: int, seconds: float) -> Tensor:
    return pipe.generate(prompt, steps=steps, seconds=seconds, guidance_scale=SCALE, seed=0).latents


def distance(made: Tensor, exact: Tensor) -> float:
    """|made - exact| / |exact|."""
    return float((made.double() - exact.double()).norm() / exact.double().norm())


def distances(args: argparse.Namespace) -> list[dict]:
    """For each of BYTES a row for the full size, and one for tiny over all kinds of its prompts."""
    exact, *found = [latents(random_models.pipeline(SIZES[args.size], device=CPU, dtype=dtype), PROMPT, args.steps,
                             SECONDS) for dtype in ("float32", *BYTES)]
    rows = [{"what": f"latents, {args.size}, random weights, {args.steps} steps, {dtype}",
             "value": distance(made, exact)} for dtype, made in zip(BYTES, found, strict=True)]
    pipes = [ldm2.load("tiny", dtype=dtype) for dtype in ("float32", *BYTES)]
    prompts = [prompt for prompt, _ in tiny_quality.PROMPTS.values()]
    squares = []
    for prompt in prompts:
        exact, *found = [latents(pipe, prompt, args.steps, 2.0) for pipe in pipes]
        squares.append([distance(made, exact) ** 2 for made in found])
    what = f"latents, tiny, {len(prompts)} prompts, {args.steps} steps"
    rows += [{"what": f"{what}, {dtype}", "value": float(mean) ** 0.5}
             for dtype, mean in zip(BYTES, np.mean(squares, axis=0), strict=True)]
    for row in rows:
        report_row(row)
    return rows


def judged(args: argparse.Namespace) -> list[dict]:
    """A row for each dtype: the share of tiny's sounds that are right; of BYTES also what they have more than float32,
    and the standard error of that."""
    rows: list[dict] = []
    exact = np.array(0.0)
    for dtype in ("float32", *BYTES):
        passed, _ = tiny_quality.generations(ldm2.load("tiny", dtype=dtype), args.seeds)
        every = np.array([value for values in passed.values() for value in values])
        rows.append({"what": f"judge, tiny, {dtype}, {len(every)} sounds", "value": float(every.mean())})
        if dtype == "float32":
            exact = every
        else:
            more = every - exact
            rows[-1] |= {"more": float(more.mean()), "error": float(more.std()) / len(more) ** 0.5}
        report_row(rows[-1])
    return rows


def line(row: dict) -> str:
    """A row of the table."""
    value = f"{row['value'] / 1e9:.2f} GB" if row.get("unit") == "GB" else f"{row['value']:.3g}"
    if "speedup" in row:
        value += f" s, {row['speedup']:.2f} times float32's speed"
    if "more" in row:
        value += f", {row['more']:+.3f} ± {row['error']:.3f} beside float32"
    return f"| {row['what']} | {value} |"


def report_row(row: dict) -> None:
    """A result as it comes."""
    print(line(row), file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="which of: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--steps", type=count, default=20, help="of the latents")
    parser.add_argument("--seeds", type=count, default=6, help="sounds of each of the judge's 36 prompts")
    parser.add_argument("--repeats", type=count, default=7, help="of the step that is timed")
    parser.add_argument("--threads", type=count, help="of torch")
    parser.add_argument("--folder", type=Path, help="of the checkpoint (default: build/random-SIZE-int8)")
    parser.add_argument("--only", choices=PROCESSES, help=argparse.SUPPRESS)
    add_out(parser)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.only is not None:
        print(alone(args.folder, PROCESSES[args.only], steps=2))
        return 0
    unknown = sorted(set(args.rows.split(",")) - set(ROWS))
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}, choose from {', '.join(ROWS)}")
    measures = {"memory": peaks, "speed": speeds, "latents": distances, "judge": judged}
    rows = [row for name in args.rows.split(",") for row in measures[name](args)]
    command = shlex.join(["python", "-m", "benchmarks.int8", *(sys.argv[1:] if arguments is None else arguments)])
    about = report.about(command, CPU, {"size": args.size})
    where = f"{about['machine']} ({about['cores']} cores, {about['vector_units']}), kernels {about['kernels']}"
    text = "\n".join([f"{where}, torch {about['torch']}",
                      "", f"`{command}`", "", "| what | |", "|---|---|", *map(line, rows)])
    print(text)
    report.write(args.out / "int8.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(report.write(args.out / "int8.md", text + "\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
