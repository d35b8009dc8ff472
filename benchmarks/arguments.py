"""Values on command lines, for argparse: a wrong one is told before anything is loaded."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

# Where benchmarks write unless told otherwise; git ignores it. `--out benchmarks/results` renews the published tables.
RESULTS = Path("build/results")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out, alike for all benchmarks."""
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the results (default: "
                        "%(default)s)")


def count(text: str) -> int:
    """A positive integer on a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number
