"""The command line: `ldm2` and `python -m ldm2`. argparse here, one function per subcommand; nothing heavy is imported
before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from ldm2 import __version__
from ldm2.audio import recorded
from ldm2.cli import (
    batch,
    checkpoints,
    doctor,
    edit,
    evaluate,
    options,
    output,
    profile,
    replay,
    serve,
    train,
    verify,
)
from ldm2.cli.signals import exit_code, terminable
from ldm2.fields import flat
from ldm2.settings import GENERATE, Settings

_LESS_MEMORY = {"low_memory": "--low-memory", "dtype": "--dtype bfloat16", "batch": "a smaller --batch",
                "num_waveforms": "fewer --num-waveforms", "seconds": "shorter --seconds"}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command `generate` to the parser's."""
    command = commands.add_parser("generate", help="make sound from a prompt", description="Make sound from a prompt.")
    options.add_prompt(command)
    command.add_argument("--settings", metavar="FILE", help="take the options from a file .json or .toml, or from a "
                         "sound file of ldm2; options on the command line take precedence")
    options.add_settings(command, GENERATE)
    options.add_output(command, "prompt")
    options.add_model_options(command)
    options.recorded_model(command)
    command.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> None:
    """Prompt -> sound file(s)."""
    told = {} if args.settings is None else recorded.read(args.settings)
    options.take_model(args, told)
    given = replay.options_in(args.settings, told, GENERATE) | options.given(args, Settings, GENERATE)
    prompt = options.one_prompt(args.prompt)
    given["prompt"] = given.get("prompt") if prompt is None else prompt
    if given["prompt"] is None and given.get("prompt_at", [(1, "")])[0][0] == 0:
        (_, given["prompt"]), *given["prompt_at"] = given["prompt_at"]       # the prompt to begin with
    asked = Settings(**given)
    settings = asked.resolved(duration=asked.seconds or float("inf"))        # refused before gigabytes are loaded
    options.check_loras(settings)
    target = output.Target.of(args, settings.prompts[0], len(settings.seeds))
    pipe = options.load(args)
    start = time.perf_counter()
    with output.watched(pipe, args, Settings(**given).resolved(pipe.defaults).steps) as progress:
        result = pipe.generate(**given, progress=progress)
    output.write(result, target, args, time.perf_counter() - start)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = options.Parser(prog="ldm2", description="AudioLDM 2: text to sound effects, music and speech.",
                         epilog="For example: ldm2 generate \"a rising sweep\" --model tiny")
    top.add_argument("--version", action="version", version=f"ldm2 {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=options.Parser)

    add(commands)
    for each in (edit, replay, batch, serve, checkpoints, train, evaluate, profile, verify, doctor):
        each.add(commands)
    return top


def _take_less(args: argparse.Namespace) -> str:
    """The options of a command that would save memory, for an error message."""
    known = {name: words for name, words in _LESS_MEMORY.items() if hasattr(args, name)}
    if args.command == "profile":
        del known["low_memory"]
    return f": {', '.join(known.values())} may help" if known else ""


def _open_streams() -> None:
    """Let nothing stand for standard streams that are closed (`<&-`), whose numbers an output file would take else."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))     # noqa: SIM115  (as long as the process lives)


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the computation failed, 2 bad input, 130 stopped by Ctrl-C,
    143 by SIGTERM."""
    # Threads that spin while they wait take a busy machine's cores from those that work: 40 s instead of 3 for the tiny
    # model's sound beside one other process. To be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _open_streams()
    logging.basicConfig(format="ldm2: %(message)s", level=logging.WARNING)
    parse = parser()
    args = parse.parse_args(argv)
    if args.command is None:
        parse.print_help()
        return 0
    try:
        with terminable():
            return args.run(args) or 0
    except KeyboardInterrupt as stop:
        print("ldm2: stopped, nothing was written", file=sys.stderr)
        return exit_code(stop)
    except (ValueError, OSError, ImportError) as error:
        print(f"ldm2: error: {flat(error)}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"ldm2: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        from ldm2.runtime.memory import out_of_memory

        if not out_of_memory(error):
            raise
        print(f"ldm2: error: out of memory{_take_less(args)}", file=sys.stderr)
        return 1
