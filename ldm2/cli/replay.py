"""The command `ldm2 replay`: a sound made again from the settings in its file; and what `ldm2 info` tells of one."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm2 import audio
from ldm2.audio import recorded
from ldm2.cli import options, output
from ldm2.fields import check_file, sha256_of
from ldm2.option_kinds import names_a_lora
from ldm2.options import default_value, from_word, options_of, refuse_unknown
from ldm2.settings import GENERATE, ORIGIN, PRESETS, RECONSTRUCT, SUBTYPES, Output, Settings

if TYPE_CHECKING:
    from ldm2.result import Result

WEIGHTS = (".pth", ".ckpt", ".pt", ".bin", ".safetensors")
COMPARED = ("ldm2", "torch", "model", "revision", "reference", "dtype", "device")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "replay", help="make a sound again from the settings in its file",
        description="Make a sound again from the settings that ldm2 wrote into its file.",
        epilog="For example: ldm2 replay old.flac --set steps=50 --set seed=7")
    command.add_argument("file", metavar="FILE", help="a sound file of ldm2, or a file .json or .toml with settings")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another value for an "
                         "option; input=FILE for an edit's input that lies elsewhere; may be repeated")
    command.add_argument("--check", action="store_true", help="compare with the samples in FILE, and write nothing "
                         "unless -o is given; exit code 1 where they differ")
    options.add_output(command, "file's name")
    options.add_model_options(command)
    options.recorded_model(command)
    command.set_defaults(run=replay)


def replay(args: argparse.Namespace) -> int:
    """Make the sound of a file again. Returns the exit code."""
    path, told = Path(args.file).expanduser(), recorded.read(args.file)
    task = told.get("task", GENERATE)
    if args.check and path.suffix.lower() in (".json", ".toml"):
        raise ValueError(f"--check compares samples, and {path} holds none")
    given = options_in(path, told, task)
    if task == RECONSTRUCT:
        raise ValueError("reconstruct is not replayed: run ldm2 reconstruct again")
    change(given, changes := _changes(args.set, task))
    source = () if task == GENERATE else (_input(path, told, changes),)
    if given.get("lora"):
        given["lora"] = [_lora(path, *each) for each in given["lora"]]
    settings = Settings.create(task, **given)
    options.take_model(args, told)
    _take_form(args, path, told)
    target = None
    if args.output is not None or not args.check:
        target = output.Target.of(args, f"{path.stem} replay", max(1, len(settings.prompts)) * settings.candidates,
                                  inputs=[path, *source])
    pipe, start = options.load(args), time.perf_counter()
    with output.watched(pipe, args, settings.resolved(pipe.defaults, duration=float("inf")).steps) as progress:
        result = getattr(pipe, task)(*source, **given, progress=progress)
    if target is not None:
        output.write(result, target, args, time.perf_counter() - start)
    return _check(path, told, result) if args.check else 0


def options_in(path: str | Path | None, told: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The options among what a file tells, held against a task. Raises ValueError with the path."""
    given = {name: value for name, value in told.items() if name not in ORIGIN}
    try:
        recorded_task = options_of(Settings)["task"].kind.check("task", given.pop("task", GENERATE))
        if recorded_task != task:
            raise ValueError(f"it holds settings of {recorded_task}: ldm2 replay makes them again")
        settings = Settings.create(task, **given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: getattr(settings, name) for name in options_of(Settings, task)
            if name != "task" and getattr(settings, name) != default_value(Settings, name)}


def change(given: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changed values in the place of recorded ones; a preset replaces all that it names."""
    for name in PRESETS.get(changes.get("preset"), {}):
        given.pop(name, None)
    given.update({name: value for name, value in changes.items() if name != "input"})


def _changes(words: Iterable[str], task: str) -> dict[str, Any]:
    """NAME=VALUE, each -> the values by the options' names. Raises ValueError."""
    known = {name: each for name, each in options_of(Settings, task).items() if name != "task"}
    ours = {word: name for name, each in known.items() for word in each.words}
    changes = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = ours.get(name.strip().replace("-", "_"), name.strip().replace("-", "_"))
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, for example steps=50, got {word!r}")
        refuse_unknown(task, [name], known, ["input"] if task != GENERATE else [])
        changes[name] = value if name == "input" else from_word(name, known[name], value)
    return changes


def _input(path: Path, told: Mapping[str, Any], changes: Mapping[str, Any]) -> Path:
    """The input of an edit: as it was, or another that is asked for. Raises ValueError or OSError."""
    if "input" in changes:
        return Path(changes["input"]).expanduser()
    if not told.get("input"):
        raise ValueError(f"{path} does not name its input: give it with --set input=FILE")
    source = Path(told["input"])
    source = source if source.exists() else path.parent / source.name
    if not source.exists():
        raise FileNotFoundError(f"the input {told['input']} is missing: say where it is with --set input=FILE")
    check_file(source)
    digest = told.get("input_sha256")
    found = sha256_of(source)
    if digest is not None and found != digest:
        raise ValueError(f"the input {source} has changed: its SHA-256 was {digest:.12}..., is {found:.12}...; to use "
                         f"it as it is, give --set input={source}")
    return source


def _lora(path: Path, word: str, *scale_and_digest: Any) -> tuple[Any, ...]:
    """A LoRA where it was, or beside the file of the sound. Raises OSError where it is in neither place."""
    beside = path.parent / Path(word).name
    if not names_a_lora(word) and not Path(word).expanduser().exists():
        if not beside.exists():
            raise FileNotFoundError(f"the LoRA {word} is missing: say where it is with --set lora=FILE:SCALE")
        word = str(beside)
    return (word, *scale_and_digest)


def _take_form(args: argparse.Namespace, path: Path, told: Mapping[str, Any]) -> None:
    """Write the file as it was written, as far as the command line leaves that open."""
    same_format = args.output is not None and Path(args.output).suffix.lower() == path.suffix.lower()
    for name, value in _form(told).items():
        if getattr(args, name) == default_value(Output, name) and (name != "subtype" or same_format):
            setattr(args, name, value)


def _form(told: Mapping[str, Any]) -> dict[str, Any]:
    """How a file was written, as far as it says so."""
    form = told.get("output")
    return dict(form) if isinstance(form, Mapping) else {}


def _check(path: Path, told: Mapping[str, Any], result: Result) -> int:
    """Say whether a result has the samples of a file, each rounded as the file's format does. Returns the exit code."""
    form = _form(told)
    words = {encoding: word for word, encoding in SUBTYPES.items()}
    subtype = words.get(audio.describe(path).encoding)
    if path.suffix.lower() in (".wav", ".flac") and subtype is not None:
        form["subtype"] = subtype
    with tempfile.TemporaryDirectory() as folder:
        again = result[0].save(Path(folder) / f"again{path.suffix}", **form)[0]
        new, new_rate = audio.read_channels(again)
    old, old_rate = audio.read_channels(path)
    if old_rate == new_rate and old.shape == new.shape and np.array_equal(old, new):
        print(f"equal: all {old.shape[-1]} samples are those of {path}")
        return 0
    print(f"different: {_distance(old, old_rate, new, new_rate)}; {_causes(told, result.settings)}")
    return 1


def _distance(old: np.ndarray, old_rate: int, new: np.ndarray, new_rate: int) -> str:
    """How far two sounds (channels, N) are from each other, in words."""
    if (old_rate, old.shape) != (new_rate, new.shape):
        shapes = (f"{sound.shape[1]} samples of {sound.shape[0]} channel{'s' * (sound.shape[0] > 1)} at {rate} Hz"
                  for sound, rate in ((old, old_rate), (new, new_rate)))
        return " were, are now ".join(shapes)
    apart = np.abs(old.astype(np.float64) - new)
    return (f"{np.count_nonzero(apart.max(axis=0))} of {old.shape[1]} samples, by {apart.max():.3g} at most (the "
            f"largest sample is {np.abs(old).max():.3g})")


def _causes(told: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was, in words."""
    names = [*COMPARED, *(name for name in now if name in options_of(Settings))]
    other = [f"{name} was {_brief(told.get(name))}, is {_brief(now.get(name))}" for name in names
             if name in told and told[name] != now.get(name)]
    unknown = [name for name in COMPARED if name not in told]
    if unknown:
        other.append(f"the file does not state its {', '.join(unknown)}")
    return "; ".join(other) or "model, versions, dtype and device are the same (another number of threads, another " \
                               "processor, or rows that were made together)"


def _brief(value: Any) -> str:
    """A value in few words."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_sound(name: str) -> bool:
    """Whether `ldm2 info` is asked about a sound file: any file that is no checkpoint's."""
    path = Path(name).expanduser()
    return path.is_file() and path.suffix.lower() not in WEIGHTS


def described(name: str) -> str:
    """What a sound file holds, a line for each thing. Raises ValueError or OSError."""
    path = Path(name).expanduser()
    about, tags = audio.describe(path), audio.read_metadata(path)
    told = {"sample rate": f"{about.sample_rate} Hz", "channels": about.channels,
            "length": f"{about.num_samples / about.sample_rate:.3f} s ({about.num_samples} samples)",
            "encoding": about.encoding, "made by": tags.get("software")}
    try:
        told |= recorded.read(path)
    except ValueError:
        told["settings"] = "none of ldm2"
    lines = (f"{name.replace('_', ' '):<18}{value}" for name, value in told.items() if value not in (None, []))
    return "\n".join(lines)
