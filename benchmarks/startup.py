"""How long ldm2 takes to start: CPU seconds of whole processes, beside `import torch`.

    python -m benchmarks.startup [--runs 5]

Each row is the smallest of some runs, user and system time together, so that other work on the machine counts little;
the first run of a row, which may find the files not yet in memory, stands beside it. Rows alternate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = {
    "import torch": ["-c", "import torch"],
    "import transformers.modeling_utils": ["-c", "import torch, transformers.modeling_utils"],
    "ldm2 --help": ["-m", "ldm2", "--help"],
    "import ldm2.loading": ["-c", "import ldm2.loading"],
    "ldm2.load('tiny')": ["-c", "import ldm2; ldm2.load('tiny')"],
    "ldm2 generate \"a siren\" --model tiny": ["-m", "ldm2", "generate", "a siren", "--model", "tiny", "-o", "x.wav",
                                               "--overwrite"],
}


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """CPU seconds of a Python process that must succeed."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(runs: int) -> dict[str, list[float]]:
    """The seconds of each row of ROWS, run by run."""
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs):
            for name, arguments in ROWS.items():
                seconds[name].append(cpu_seconds(arguments, Path(folder)))
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """The rows as Markdown."""
    lines = ["| process | first run, CPU s | best, CPU s | beside `import torch` |", "|---|---|---|---|"]
    torch = min(seconds["import torch"])
    for name, values in seconds.items():
        lines.append(f"| `{name}` | {values[0]:.2f} | {min(values):.2f} | {min(values) / torch:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each process (default 5)")
    print(table(measure(max(1, parser.parse_args().runs))))


if __name__ == "__main__":
    main()
