"""The command `ldm2 eval`: numbers that judge sound files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm2.metrics.evaluation import Report

SHOWN = {"clap_score": "CLAP score", "frechet_audio_distance": "FAD", "kernel_audio_distance": "KAD"}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "eval", help="judge sound files: CLAP score, Frechet and kernel audio distance",
        description="CLAP score of sounds with their prompts; Frechet audio distance (also extrapolated to infinite N) "
        "and kernel audio distance of sounds from a reference. The numbers of one file are those of a set without "
        "spread. Numbers compare only with the same embedding, revision, resampler, and about the same N and length.",
    )
    command.add_argument("generated", help="folder of sounds, or one file")
    command.add_argument("--reference", metavar="FOLDER", help="sounds as they should be: the distances need them")
    command.add_argument("--prompts", metavar="MANIFEST.jsonl", help="a line {\"path\": ..., \"prompt\": ...} for each "
                         "sound (default: the prompts that ldm2 writes into its files)")
    command.add_argument("--clap", metavar="NAME", help="whose CLAP embeds: a checkpoint, or a ClapModel by its hub "
                         "name or folder (default: the model that made the sounds, if they say so, else "
                         "laion/clap-htsat-unfused)")
    command.add_argument("--revision", help="branch, tag or commit of that model on the hub")
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    from ldm2.metrics import embedding, evaluation
    from ldm2.runtime.device import choose_device

    device = choose_device(args.device)
    generated = evaluation.sound_files(args.generated)
    reference = [] if args.reference is None else evaluation.sound_files(args.reference)
    if args.prompts is None:
        prompts = evaluation.inner_prompts(generated)
    else:
        prompts = evaluation.manifest_prompts(args.prompts, generated)
    if not prompts and not reference:
        raise ValueError(f"nothing to compute: {args.generated} holds no prompts, so give --prompts or --reference")
    clap = embedding.load(args.clap or _maker(generated), device=device, revision=args.revision,
                          local_files_only=args.local_files_only)
    from tqdm import tqdm

    with tqdm(total=len(generated) + len(reference), unit="sound", disable=not sys.stderr.isatty(), leave=False) as bar:
        report = evaluation.evaluate(generated, clap, reference=reference, prompts=prompts, each=bar.update)
    print(json.dumps(report.as_json(), indent=1) if args.json else table(report))


def _maker(paths: list[Path]) -> str:
    """The model that all sounds say has made them, else the default."""
    from ldm2.metrics import embedding, evaluation

    models = {evaluation.settings_inside(path).get("model") for path in paths}
    [model] = models if len(models) == 1 else [None]
    return model if isinstance(model, str) else embedding.DEFAULT


def table(report: Report) -> str:
    """For people: a line for each number in total, then one for each file."""
    lines = []
    for score in report.scores:
        more = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in score.more.items())
        against = ""
        if score.n_reference is not None:
            against = f" against {score.n_reference} sounds, {score.seconds_reference:.1f} s in all"
        lines.append(f"{score.name}: {score.value:.6g}{more} ({score.n} sounds, {score.seconds:.1f} s in all{against}; "
                     f"{score.embedding} at {score.revision}, {score.resampler})")
    lines += [f"note: {note}" for note in report.notes]
    shown = {name: title for name, title in SHOWN.items()
             if any(getattr(sound, name) is not None for sound in report.sounds)}
    rows = [("file", "seconds", *shown.values())]
    for sound in report.sounds:
        values = (getattr(sound, name) for name in shown)
        rows.append((str(sound.path), f"{sound.seconds:.2f}",
                     *("-" if value is None else f"{value:.4f}" for value in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join([*lines, "", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                                    for row in rows)])
