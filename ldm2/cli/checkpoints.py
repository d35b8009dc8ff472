"""The commands about checkpoints: `ldm2 models`, `download`, `info` and `convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm2.checkpoints.known import MODELS
from ldm2.cli import options, replay


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser's."""
    command = commands.add_parser("models", help="list the known checkpoints")
    command.set_defaults(run=models)

    command = commands.add_parser("download", help="fetch a checkpoint, to work offline later")
    command.add_argument("model", help="short name or hub name")
    options.add_revision_options(command)
    command.add_argument("--force", action="store_true", help="download it again even if it is in the cache")
    command.set_defaults(run=download)

    command = commands.add_parser("info", help="describe a checkpoint: parts, parameters, dtype, heads; a sound "
                                  "file, with its settings; or a LoRA")
    command.add_argument("model", help="short name, hub name or folder; a sound file; or a LoRA")
    options.add_source_options(command)
    command.set_defaults(run=info)
    _add_convert(commands)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("convert", help="write a checkpoint as a folder of safetensors")
    command.add_argument("source", help="authors' .pth file, folder with pickles, or a name that ldm2 knows")
    command.add_argument("folder", help="output folder; written as FOLDER.partial and renamed when complete; rerun to "
                         "resume")
    options.add_source_options(command)
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "int8"),
                         help="default: as in the source")
    command.add_argument("--config", metavar="FILE", help="the authors' configuration, YAML or JSON (default: "
                         "recognised from the file)")
    command.add_argument("--tokenizers", metavar="FOLDER", help="a folder with tokenizer and tokenizer_2 (default: "
                         "their own hub repositories)")
    command.add_argument("--reference", choices=("authors", "diffusers"), default="authors",
                         help="what a single number of heads in a folder means (default: authors; see weights.md)")
    command.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merge a LoRA into the "
                         "weights; may be repeated")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it is a checkpoint")
    command.set_defaults(run=convert)


def models(args: argparse.Namespace) -> None:
    """Table of known checkpoints."""
    print(table())


def download(args: argparse.Namespace) -> None:
    """Fetch a checkpoint into the hub's cache."""
    from ldm2.checkpoints import hub

    print(hub.resolve(args.model, revision=args.revision, variant=args.variant, force=args.force))


def info(args: argparse.Namespace) -> None:
    """Parts, parameters, dtypes and heads of a checkpoint, or what a sound file or a LoRA holds."""
    if replay.is_sound(args.model):
        print(replay.described(args.model))
        return
    from ldm2.checkpoints import hub, lora_files
    from ldm2.checkpoints.describe import describe, describe_lora

    if lora_files.is_lora(args.model):
        print(describe_lora(args.model))
        return
    path = hub.resolve(args.model, args.revision, args.local_files_only, variant=args.variant)
    with hub.opened(path, args.model):
        print(describe(path, args.variant))


def convert(args: argparse.Namespace) -> None:
    """Checkpoint of any kind -> folder in the hub's layout."""
    from ldm2.checkpoints.convert import convert

    done = convert(
        args.source, args.folder, args.dtype, args.overwrite, config=args.config, tokenizers=args.tokenizers,
        reference=args.reference, revision=args.revision, local_files_only=args.local_files_only,
        variant=args.variant, lora=args.lora,
    )
    print(done.notice, file=sys.stderr)
    print(args.folder)


def table(cache_dir: str | Path | None = None) -> str:
    """The known checkpoints as text, one a line: what `ldm2 models` prints."""
    from ldm2.checkpoints.hub import is_cached

    rows = [("name", "task", "rate", "parameters", "download", "here", "licence", "from", "same weights as")]
    for model in MODELS:
        rows.append((
            model.name, model.task, f"{model.sample_rate // 1000} kHz", _count(model.parameters),
            "-" if model.layout == "bundled" else _bytes(model.download),
            "yes" if is_cached(model, cache_dir) else "no",
            model.license, model.repo or "this package", model.same_as or "",
        ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e6:.0f} M"


def _bytes(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e9:.1f} GB"
