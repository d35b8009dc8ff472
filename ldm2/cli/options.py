"""The options of the command line. Those of a request are made from `ldm2.settings`; nothing heavy is imported."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm2.checkpoints.known import DEFAULT_MODEL
from ldm2.option_kinds import names_a_lora
from ldm2.options import Option, default_value, options_of
from ldm2.settings import Output, Settings

if TYPE_CHECKING:
    from ldm2.pipeline import AudioLDM2

# Headings of the help text by the groups of options, in their order.
HEADINGS = {
    "sound": "the sound", "edit": "the edit", "sampling": "how the diffusion runs",
    "long sound": "long sounds, loops and prompts over time", "speech models": "speech models",
    "output": "how the file is written",
}
NOT_OPTIONS = ("prompt", "task")           # arguments and commands instead


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all our errors are."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            dashed = unknown[0].startswith("-") and hasattr(found, "prompt")
            hint = "; a prompt that begins with - goes after --" if dashed else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str):
        hint = ""
        if message.endswith("expected one argument"):
            flag = message.removeprefix("argument ").partition(":")[0].rpartition("/")[2]
            hint = f"; a value that begins with - goes after =: {flag}=-..." if flag.startswith("--") else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")


def add_settings(command: argparse.ArgumentParser, task: str) -> None:
    """Every option of a task, under the heading of its group."""
    known = options_of(Settings, task)
    for group, heading in HEADINGS.items():
        names = [name for name, each in known.items() if each.group == group and name not in NOT_OPTIONS]
        if names:
            section = command.add_argument_group(heading)
            for name in names:
                add_option(section, Settings, name, known[name], task)


def add_output(command: argparse.ArgumentParser, source: str) -> None:
    """Where the result goes, how it is written, and how much is said. source: what names the file by default."""
    section = command.add_argument_group(HEADINGS["output"])
    section.add_argument("-o", "--output", metavar="FILE", help="file to write, whose suffix names the format; a "
                         f"folder, for a name made from the {source} in it (FOLDER/ is made); or - for WAV on stdout "
                         f"(default: a name made from the {source}, .wav, in the current folder)")
    section.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    for name, each in options_of(Output).items():
        add_option(section, Output, name, each, "")
    how_much = command.add_mutually_exclusive_group()
    how_much.add_argument("-q", "--quiet", action="store_true", help="print the written path only")
    how_much.add_argument("-v", "--verbose", action="store_true", help="report device, dtype, kernels, and the time "
                          "and memory of each stage")


def add_option(section: argparse._ActionsContainer, cls: type, name: str, each: Option, task: str) -> None:
    """One option of a dataclass."""
    flags = [each.flag or f"--{name.replace('_', '-')}", *(f"--{word.replace('_', '-')}" for word in each.words)]
    value, kind = default_value(cls, name), each.kind.schema
    if kind.get("type") == "boolean":
        section.add_argument(*flags, dest=name, action="store_false" if value else "store_true", help=each.help)
        return
    default = each.default_for(task) if value in (None, ()) else value
    told = [] if default is None else [_word(default)]
    told += ["the model's own"] if each.of_checkpoint and default == each.default else []
    suffix = f" (default: {', or '.join(told)})" if told else ""
    repeated: dict[str, Any] = {"action": "append"} if kind.get("type") == "array" and "maxItems" not in kind else {}
    section.add_argument(*flags, dest=name, type=_reader(name, each, bool(repeated)), metavar=each.metavar,
                         help=(each.help + suffix).replace("%", "%%"), **repeated)


def _word(value: Any) -> str:
    """A default as it is written on a command line."""
    if isinstance(value, tuple):
        return ":".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reader(name: str, each: Option, repeated: bool) -> Callable[[str], Any]:
    """What argparse reads a value with; it is checked at once, a repeated one when all of them are there."""

    def read(text: str) -> Any:
        try:
            value = each.kind.parse(text)
            return value if repeated else each.kind.check(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def given(args: argparse.Namespace, cls: type, task: str | None = None) -> dict[str, Any]:
    """The options of a dataclass that stand on the command line, by their names."""
    named = {name: getattr(args, name, None) for name in options_of(cls, task) if name not in NOT_OPTIONS}
    return {name: value for name, value in named.items() if value is not None and value != default_value(cls, name)}


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where and how it runs."""
    section = command.add_argument_group("the model")
    add_checkpoint_options(section)
    section.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16, int8 or "
                         "w8a8 (default: auto)")
    section.add_argument("--low-memory", action="store_true", help="keep only the part of the model in memory that is "
                         "running: the same sound, plus the time to read each part again")
    section.add_argument("--compile", action="store_true", help="compile the UNet's step with torch.compile at its "
                         "first call, which takes minutes")


def add_checkpoint_options(section: argparse._ActionsContainer) -> None:
    """Which checkpoint, where it runs, and whose arithmetic it has."""
    section.add_argument("--model", default=DEFAULT_MODEL, help="short name, hub name, folder or authors' file; "
                         f"\"tiny\" is bundled and needs no network (default: {DEFAULT_MODEL})")
    add_source_options(section)
    section.add_argument("--tokenizers", metavar="FOLDER", help="for authors' .pth files: a folder with tokenizer and "
                         "tokenizer_2 (default: their own hub repositories)")
    section.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    section.add_argument("--reference", default="authors", help="whose arithmetic to reproduce: authors or diffusers "
                         "(default: authors; see weights.md)")


def recorded_model(command: argparse.ArgumentParser) -> None:
    """Let a file of settings name the model, in which case it is loaded as the file says: see `take_model`."""
    command.set_defaults(model=None, revision=None, reference=None, dtype=None)


def take_model(args: argparse.Namespace, origin: Mapping[str, Any]) -> None:
    """Fill in what the command line leaves open of the model: from a file's origin, else the defaults."""
    another = args.model is not None and args.model != origin.get("model")
    for name, default in {"model": DEFAULT_MODEL, "revision": None, "reference": "authors", "dtype": "auto"}.items():
        if getattr(args, name) is None:
            told = None if another and name == "revision" else origin.get(name)
            setattr(args, name, default if told is None else told)


def add_source_options(command: argparse._ActionsContainer) -> None:
    """Which version of a checkpoint on the hub."""
    add_revision_options(command)
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")


def add_revision_options(command: argparse._ActionsContainer) -> None:
    """Which of the files that a repository holds."""
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--variant", metavar="WORD", help="in the names of the weight files to take, for example fp16 "
                         "for model.fp16.safetensors")


def add_prompt(command: argparse.ArgumentParser, help: str | None = None) -> None:
    """The prompt as an argument."""
    help = options_of(Settings)["prompt"].help if help is None else help
    command.add_argument("prompt", nargs="*", metavar="PROMPT", help=f"{help}; - reads it from stdin")


def one_prompt(words: list[str]) -> str | None:
    """The prompt that stands on a command line; None where there is none. Raises ValueError for several words."""
    if len(words) > 1:
        raise ValueError(f"one prompt, please: put quotes around it, \"{' '.join(words)}\"")
    if words == ["-"]:
        try:
            return sys.stdin.read().removeprefix("\ufeff").strip()           # what some shells put before a text
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not text: {error}") from None
    return words[0] if words else None


def check_loras(settings: Settings) -> None:
    """Raise OSError for a LoRA that is given by a path where there is none, before gigabytes are loaded."""
    for word in (each[0] for each in settings.lora or ()):
        if not names_a_lora(word) and not Path(word).expanduser().exists():
            raise FileNotFoundError(f"the LoRA {word} does not exist")


def load(args: argparse.Namespace) -> AudioLDM2:
    """The checkpoint of add_model_options. With --verbose its stages report to stderr from here on."""
    import torch

    import ldm2
    from ldm2.loading import choose_device
    from ldm2.runtime.inference import check_precision

    if getattr(args, "verbose", False):
        logging.getLogger("ldm2").setLevel(logging.INFO)
    if args.dtype == "float16":                            # told before gigabytes are loaded
        check_precision(choose_device(args.device), torch.float16)
    start = time.perf_counter()
    pipe = ldm2.load(
        args.model, device=args.device, dtype=args.dtype, reference=args.reference, revision=args.revision,
        variant=args.variant, local_files_only=args.local_files_only, tokenizers=args.tokenizers,
        low_memory=args.low_memory, compile=args.compile, progress=not getattr(args, "quiet", True),
    )
    logging.getLogger("ldm2").info("loaded %s in %.1f s: %s on %s", args.model, time.perf_counter() - start,
                                   pipe.origin["dtype"], pipe.device)
    return pipe
