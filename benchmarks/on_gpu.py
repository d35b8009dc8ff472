"""All that needs an NVIDIA GPU in one call: tests of what runs there and benchmarks, what matters most first.

    python -m benchmarks.on_gpu [--minutes 9] [--parts NAME,...] [--out FOLDER] [--pack FILE.tar.gz]

Run it in the repository's folder; nothing has to be installed. Each part is a process with a limit of its own: one that
fails or is slow costs the others nothing. After each, gpu.md among the results says what came of all so far; of a part
there are gpu-PART.log, .md, .json and .png. --pack keeps all of them so far in one file. Without diffusers (which may
lie on PYTHONPATH) ldm2 is timed alone, and parts that need diffusers are left out; soundfile and soxr are not needed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.arguments import add_out, positive
from ldm2 import atomic

ROOT = Path(__file__).parents[1]
DONE, ALONE = "done", "diffusers is not installed: ldm2 is timed alone, and parts that need diffusers are left out."


@dataclass(frozen=True)
class Part:
    """`python -m` some command, for at most so many seconds. needs: a package without which it is left out.

    environment: what is added to that of all parts.
    """

    name: str
    seconds: float
    command: list[str]
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def parts(device: str, size: str, out: Path) -> list[Part]:
    """In order of importance; what has to be compiled comes after the same without."""
    def rows(subjects: str, dtype: str, seconds: float, needs: str | None = None, name: str | None = None,
             options: str = "", **environment: str) -> Part:
        name = name or f"{subjects}-{dtype}"
        command = f"benchmarks --device {device} --size {size} --dtype {dtype} --rows {subjects} {options}".split()
        return Part(name, seconds, [*command, "--out", str(out), "--name", f"gpu-{name}"], needs, environment)

    pytest = ["pytest", *(("-n", "8") if find_spec("xdist") else ())]
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(path.relative_to(ROOT)) for path in tests if "mark.cuda" in path.read_text("utf-8")]
    folder = f"build/random-{size}"                        # where benchmarks look for it
    weights = [] if size == "tiny" or Path(folder).exists() else [
        Part("weights", 150, ["benchmarks.full_size", folder, "--size", size], "diffusers")]
    every = [
        Part("kernel-tests", 100, [*pytest, "tests/kernels/test_triton.py"]),
        *weights, rows("unet", "float16", 120),
        Part("cuda-tests", 90, [*pytest, "-m", "cuda", *marked], "diffusers"),
        rows("generation", "float16", 120), rows("memory", "float16", 120, "diffusers"),
        rows("diffusers-compiled", "float16", 180, "diffusers"),
        # Choices of PyTorch's that may be bad ones: attention by cuDNN, and convolutions by rules of thumb.
        rows("unet", "float16", 60, None, "unet-float16-no-cudnn-attention", "--no-diffusers",
             TORCH_CUDNN_SDPA_DEPRIORITIZED="1"),
        rows("unet", "float16", 60, None, "unet-float16-cudnn-benchmark", "--no-diffusers --cudnn-benchmark"),
        rows("kernels", "float16", 60), rows("batch", "float16", 90),
        rows("generation-compiled", "float16", 180, "diffusers"), rows("ldm2-compiled", "float16", 240),
        rows("unet", "bfloat16", 120), rows("length", "float16", 120), rows("generation", "bfloat16", 120),
        rows("batch", "bfloat16", 90), rows("vae,vocoder,text,load", "float16", 90, name="stages-float16"),
    ]
    # A CPU compiles even the tiny model for minutes.
    return [part for part in every if device.startswith("cuda") or "-compiled-" not in part.name]


def run(part: Part, left: float, log: Path) -> tuple[str, float, list[str]]:
    """What came of a part in `left` seconds at most, after how many, and what it told."""
    missing = part.needs is not None and find_spec(part.needs) is None
    if missing or left < 15:                               # seconds: not worth beginning
        return f"left out: {f'{part.needs} is not installed' if missing else 'no time left'}", 0.0, []
    limit, start = min(part.seconds, left), time.monotonic()
    places = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1"} | part.environment
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", *part.command], stdout=file, stderr=subprocess.STDOUT,
                                   env=environment, process_group=0)
        try:
            code = process.wait(limit)
            what = DONE if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            what = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:                     # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line[:300] for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    told = list(dict.fromkeys(line for line in lines if line.startswith("| ")))     # one by one, then as a table
    return what, time.monotonic() - start, told or lines[-1:] if what == DONE else told + lines[-12:]


def markdown(outcomes: dict[str, tuple[str, float, list[str]]]) -> str:
    """A table of the parts, and what each told."""
    lines = [*([] if find_spec("diffusers") else [ALONE, ""]), "| part | outcome | s |", "|---|---|---|"]
    lines += [f"| {name} | {what} | {seconds:.0f} |" for name, (what, seconds, _) in outcomes.items()]
    for name, (_, _, told) in outcomes.items():
        lines += ["", f"{name}:", "```", *told, "```"] if told else []
    return "\n".join(lines) + "\n"


def pack(path: Path, out: Path, names: Iterable[str]) -> None:
    """An archive of the overview and of the files of these parts, in place of an earlier one."""
    found = [out / "gpu.md", *(file for name in names for file in sorted(out.glob(f"gpu-{name}.*")))]
    with atomic.whole(path, overwrite=True) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for file in found:
            archive.add(file, file.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 unless all were done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=positive, default=9.0, help="for everything (default: %(default)g)")
    every = ", ".join(part.name for part in parts("cuda", "base", Path()))
    parser.add_argument("--parts", help=f"only these of {every}")
    parser.add_argument("--device", default="cuda", help="cpu with --size tiny rehearses (default: %(default)s)")
    parser.add_argument("--size", choices=("base", "large", "tiny"), default="base")
    add_out(parser)
    parser.add_argument("--pack", type=Path, help="a .tar.gz of all results so far, written after each part")
    args = parser.parse_args(arguments)
    known = {part.name: part for part in parts(args.device, args.size, args.out)}
    asked = list(known) if args.parts is None else args.parts.split(",")
    if not set(asked) <= set(known):
        parser.error(f"unknown parts {', '.join(sorted(set(asked) - set(known)))}, choose from {', '.join(known)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no NVIDIA GPU")
    for folder in [args.out, *([] if args.pack is None else [args.pack.parent])]:
        folder.mkdir(parents=True, exist_ok=True)
    outcomes, end = {}, time.monotonic() + 60 * args.minutes
    for name in asked:
        for suffix in ("json", "md", "png"):               # of an earlier run, which would pass for this one's
            (args.out / f"gpu-{name}.{suffix}").unlink(missing_ok=True)
        outcomes[name] = run(known[name], end - time.monotonic(), args.out / f"gpu-{name}.log")
        print(markdown({name: outcomes[name]}), flush=True)
        with atomic.whole(args.out / "gpu.md", overwrite=True) as temporary:
            temporary.write_text(markdown(outcomes), encoding="utf-8")
        if args.pack is not None:
            pack(args.pack, args.out, outcomes)
    return 0 if all(what == DONE for what, _, _ in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
