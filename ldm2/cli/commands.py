"""The command line: `ldm2` and `python -m ldm2`. argparse here, one function per subcommand; nothing heavy is imported
before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from ldm2 import __version__, audio
from ldm2.cli import doctor, edit, options, profile, verify
from ldm2.settings import DEFAULTS

_LESS_MEMORY = {"low_memory": "--low-memory", "dtype": "--dtype float16 or bfloat16", "batch": "a smaller --batch",
                "num_waveforms": "fewer --num-waveforms", "seconds": "shorter --seconds"}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all our errors are."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def generate(args: argparse.Namespace) -> None:
    """Prompt -> sound file(s)."""
    prompt, prompt_at = options.prompts(args)
    target = Path(args.output) if args.output else options.name_for(prompt, args.overwrite)
    from ldm2.result import output_paths

    for path in output_paths(target, max(1, args.num_waveforms)):
        audio.check_output(path, overwrite=args.overwrite)

    from ldm2.settings import recipe

    settings = options.sampling(args) | {"prompt_at": prompt_at}
    names = ("seconds", "window", "overlap", "loop", "transcription", "phonemes")
    settings |= {name: getattr(args, name) for name in names}
    recipe(prompt, **settings)                             # a wrong value is told before gigabytes are loaded
    pipe = options.load(args)
    start = time.perf_counter()
    result = pipe.generate(prompt, **settings, progress=options.progress(args))
    elapsed = time.perf_counter() - start
    paths = result.save(target, overwrite=args.overwrite)
    if not args.quiet:
        options.report(result, pipe, elapsed, args.dtype)
    for path in paths:
        print(path)


def models(args: argparse.Namespace) -> None:
    """Table of known checkpoints."""
    from ldm2.cli.models import table

    print(table())


def download(args: argparse.Namespace) -> None:
    """Fetch a checkpoint into the hub's cache."""
    from ldm2.checkpoints import hub

    print(hub.resolve(args.model, revision=args.revision, variant=args.variant))


def info(args: argparse.Namespace) -> None:
    """Parts, parameters, dtypes and heads of a checkpoint, read from its configs and headers."""
    from ldm2 import weights
    from ldm2.checkpoints import hub

    path = hub.resolve(args.model, args.revision, args.local_files_only, variant=args.variant)
    print(weights.describe(path, args.variant))


def convert(args: argparse.Namespace) -> None:
    """Checkpoint of any kind -> folder in the hub's layout."""
    from ldm2.checkpoints.convert import convert

    done = convert(
        args.source, args.folder, args.dtype, args.overwrite, config=args.config, tokenizers=args.tokenizers,
        reference=args.reference, revision=args.revision, local_files_only=args.local_files_only,
        variant=args.variant,
    )
    print(done.notice, file=sys.stderr)
    print(args.folder)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="ldm2", description="AudioLDM2: text in, sound, music or speech out.")
    top.add_argument("--version", action="version", version=f"ldm2 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    command = commands.add_parser("generate", help="make sound from a prompt", description="Make sound from a prompt.")
    command.add_argument("prompt", nargs="?", help="what to hear, for example \"a dog barking in the rain\"")
    options.add_output_options(command, "prompt")
    options.add_model_options(command)
    command.add_argument("--seconds", type=float, help=f"length (default: {DEFAULTS['seconds']}, or the model's own)")
    options.add_speech_options(command)
    options.add_time_options(command)
    options.add_sampling_options(command)
    command.set_defaults(run=generate)

    edit.add(commands)

    command = commands.add_parser("models", help="list the known checkpoints")
    command.set_defaults(run=models)

    command = commands.add_parser("download", help="fetch a checkpoint, to work offline later")
    command.add_argument("model", help="short name or hub name")
    options.add_revision_options(command)
    command.set_defaults(run=download)

    command = commands.add_parser("info", help="describe a checkpoint: parts, parameters, dtype, heads")
    command.add_argument("model", help="short name, hub name or folder")
    options.add_source_options(command)
    command.set_defaults(run=info)

    command = commands.add_parser("convert", help="write a checkpoint as a folder of safetensors")
    command.add_argument("source", help="authors' .pth file, folder with pickles, or a name that ldm2 knows")
    command.add_argument("folder", help="where to; grows as FOLDER.partial, and a second call takes up what is there")
    options.add_source_options(command)
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as in the source")
    command.add_argument("--config", metavar="FILE", help="the authors' configuration, YAML or JSON (default: "
                         "recognised from the file)")
    command.add_argument("--tokenizers", metavar="FOLDER", help="a folder with tokenizer and tokenizer_2 (default: "
                         "their own hub repositories)")
    command.add_argument("--reference", choices=("authors", "diffusers"), default="authors",
                         help="what a single number of heads in a folder means (default: authors; see weights.md)")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it is a checkpoint")
    command.set_defaults(run=convert)

    profile.add(commands)
    verify.add(commands)
    doctor.add(commands)
    return top


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says so: Python's, or PyTorch's, of which only some have a type of their own."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _take_less(args: argparse.Namespace) -> str:
    """What a command can do about it."""
    known = {name: words for name, words in _LESS_MEMORY.items() if hasattr(args, name)}
    if args.command == "profile":
        del known["low_memory"]
    return f": {', '.join(known.values())} may help" if known else ""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the computation failed, 2 bad input, 130 stopped by Ctrl-C."""
    # Threads that spin while they wait take a busy machine's cores from those that work: 40 s instead of 3 for the tiny
    # model's sound beside one other process. To be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(format="ldm2: %(message)s", level=logging.WARNING)
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("ldm2: stopped, nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"ldm2: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"ldm2: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"ldm2: error: out of memory{_take_less(args)}", file=sys.stderr)
        return 1
    return 0
