"""The long run: so many cases from a seed, a table of what came of them, and each that fell short."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.damage import Seeded
from tests.fuzz.inputs import Arguments, Sounds
from tests.fuzz.judge import OUTCOMES, SECONDS, Alarm, targets


def main() -> int:
    """0 if every case came out right, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="how many for each kind of input")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        counts = {}
        for kind, target in (targets(place) | {"sound": Sounds(), "arguments": Arguments()}).items():
            counts[kind] = Counter()
            (place / "case").mkdir(exist_ok=True)
            for case in range(args.cases):
                seed = args.seed * 1_000_003 + case
                with Alarm(SECONDS):
                    verdict = target.case(place / "case", Seeded(seed))
                counts[kind][verdict.outcome] += 1
                if verdict.outcome != "right":
                    print(f"{kind}, seed {seed}: {verdict.outcome}: {verdict.done}\n    {verdict.found}", flush=True)
    print(f"{'':16}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    for kind, found in counts.items():
        print(f"{kind:16}" + "".join(f"{found[outcome]:12}" for outcome in OUTCOMES))
    return int(any(found[outcome] for found in counts.values() for outcome in OUTCOMES[1:]))


if __name__ == "__main__":
    sys.exit(main())
