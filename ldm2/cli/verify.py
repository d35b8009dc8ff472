"""The command `ldm2 verify-weights`: whether the published weights give the samples that diffusers' tests expect."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm2.checkpoints import known
from ldm2.fields import few, flat

if TYPE_CHECKING:
    from ldm2.checkpoints.verify import Compared
    from ldm2.pipeline import AudioLDM2

SKIPPED, FAILED, DONE = "skipped", "failed", "checked"


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    whole = sum(model.download or 0 for model in known.MODELS)
    command = commands.add_parser(
        "verify-weights", help="check ldm2 on the published weights",
        description="Compute the samples that diffusers' tests expect of the published checkpoints, check that each "
        "tensor of a checkpoint is used, and print what its files say. What is not in the cache is fetched; without a "
        "network it is skipped. Needs minutes of a CPU for each checkpoint.",
    )
    command.add_argument("--model", action="append", metavar="NAME", help="a checkpoint of `ldm2 models`; may be given "
                         "several times (default: those with pinned samples, and what is in the cache)")
    command.add_argument("--all", action="store_true", help="every known checkpoint: "
                         f"{whole / 1e9:.0f} GB to fetch")
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")
    command.add_argument("--json", action="store_true", help="print JSON instead of lines")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check each, print what came of it. Raises ArithmeticError if one of them is not as it should be."""
    if args.model and args.all:
        raise ValueError(f"--all and --model {args.model[0]} exclude each other")
    chosen = [_known(name) for name in args.model] if args.model else _by_default(args.all)
    reports = []
    for model in chosen:
        reports.append(report(model, args.local_files_only))
        if not args.json:
            print("\n".join(lines(reports[-1])), flush=True)
    if args.json:
        print(json.dumps(reports, indent=1))
    left = [model.name for model in known.MODELS if model.repo is not None and model not in chosen]
    if left and not args.model:
        print(f"not checked, as they are not in the cache: {', '.join(left)} (--all)", file=sys.stderr)
    failed = [row["model"] for row in reports if row["outcome"] == FAILED]
    if failed:
        raise ArithmeticError(f"{len(failed)} of {len(reports)} checkpoints are not as they should be: "
                              f"{', '.join(failed)}")


def _known(name: str) -> known.Model:
    model = known.find(name)
    if model is None:
        raise known.unknown(name)
    return model


def _by_default(all_of_them: bool) -> list[known.Model]:
    """Published checkpoints: all, or those with pinned samples and those in the cache."""
    from ldm2.checkpoints import hub
    from ldm2.checkpoints.verify import PINS

    pinned = {pin.model for pin in PINS}
    published = [model for model in known.MODELS if model.repo is not None]
    return [model for model in published if all_of_them or model.name in pinned or hub.is_cached(model)]


def report(model: known.Model, local_files_only: bool = False) -> dict:
    """What came of one checkpoint, as plain values. Without network and cache its outcome is "skipped"."""
    from ldm2.checkpoints import hub

    told = {"model": model.name, "repo": model.repo}
    try:
        path = hub.resolve(model.name, local_files_only=local_files_only)
        return told | {"commit": hub.commit_of(path)} | _checks(model, path)
    except (FileNotFoundError, ConnectionError) as error:
        return told | {"outcome": SKIPPED, "reason": str(error)}
    except (ValueError, OSError, ArithmeticError) as error:
        return told | {"outcome": FAILED, "reason": flat(error)}


def _checks(model: known.Model, path: Path) -> dict:
    """Facts first: they explain why a checkpoint cannot be loaded, if it cannot."""
    from ldm2.checkpoints import verify

    said = verify.facts(path)
    told: dict[str, Any] = {"facts": said}
    try:
        with verify.watched_keys() as keys:
            pipe = _load(path)
            ranking = _ranking(pipe)
        told |= {"keys": {name: vars(found) for name, found in keys.items()}, "ranking": ranking,
                 "inferred": verify.inferred(said, pipe.native_latent_frames)}
        pins = [pin for pin in verify.PINS if pin.model == model.name]
        compared = [verify.compare(pin, pipe, verify.scheduler(path)) for pin in pins]
    except (ValueError, OSError, ArithmeticError) as error:
        return told | {"outcome": FAILED, "reason": flat(error)}
    agree = all(pin.agrees for pin in compared)
    return told | {"pins": [_plain(pin) for pin in compared], "outcome": DONE if agree else FAILED,
                   "reason": None if agree else "the samples differ"}


def _load(path: Path) -> AudioLDM2:
    import ldm2

    return ldm2.load(path, device="cpu", dtype="float32", reference="diffusers", low_memory=True)


def _ranking(pipe: AudioLDM2) -> str | None:
    """None where the checkpoint can rank candidates, why not elsewhere."""
    import numpy as np

    try:
        pipe.rank(np.zeros((1, pipe.sample_rate), np.float32), ["silence"])
    except ValueError as error:
        return str(error)
    return None


def _plain(found: Compared) -> dict:
    pin = found.pin
    return {"scheduler": pin.scheduler, "steps": pin.steps, "first": pin.first, "expected": list(pin.expected),
            "found": list(found.found), "distance": found.distance, "agrees": found.agrees}


def lines(told: dict) -> list[str]:
    """A report for people."""
    name = f"{told['model']} ({told['repo']})"
    if told["outcome"] == SKIPPED:
        return [f"{name}: skipped: {told['reason']}"]
    result = [f"{name} at {told.get('commit') or 'no commit'}:"]
    for part, fields in told.get("facts", {}).items():
        result.append(f"  {part} says " + ", ".join(f"{field} {json.dumps(value)}" for field, value in fields.items()))
    for part, keys in told.get("keys", {}).items():
        dropped = keys["dropped"]
        rest = f"all but {len(dropped)} used, dropped by name: {few(dropped, 4)}" if dropped else "all used"
        result.append(f"  {part}: {keys['tensors']} tensors, {rest}")
    if told.get("ranking"):
        result.append(f"  ranking: {told['ranking']}")
    result += [f"  inferred, {what}: {words}" for what, words in told.get("inferred", {}).items()]
    for pin in told.get("pins", []):
        last = pin["first"] + len(pin["expected"]) - 1
        result += [
            f"  {pin['scheduler']}, {pin['steps']} steps, samples {pin['first']} to {last}:",
            "    expected " + " ".join(f"{value:8.4f}" for value in pin["expected"]),
            "    found    " + " ".join(f"{value:8.4f}" for value in pin["found"]),
            f"    distance {pin['distance']:.1e}: {'agrees' if pin['agrees'] else 'DIFFERS'}",
        ]
    return [*result, f"  {told['outcome']}" + (f": {told['reason']}" if told["reason"] else "")]
