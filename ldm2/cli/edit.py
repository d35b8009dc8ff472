"""The commands that take a sound: transfer, inpaint, extend, super-resolution, variations, reconstruct."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm2.cli import options, output
from ldm2.settings import EXTEND, INPAINT, RECONSTRUCT, SUPER_RESOLUTION, TRANSFER, VARIATIONS, Settings

if TYPE_CHECKING:
    from ldm2.edit.sound import Sound

UNITS = {
    "log_mel_distance": "(natural log)", "spectral_convergence": "", "multi_resolution_stft": "",
    "level_difference": "dB",
}
# What each command does, and arguments that make sense.
COMMANDS = {
    TRANSFER: ("give a sound the content of a prompt", "rain.wav \"applause\" --strength 0.6"),
    INPAINT: ("regenerate parts of a sound, and keep the rest as it is",
              "street.wav \"a dog barking\" --time 2.5:4 --time 7:8"),
    EXTEND: ("continue a sound: more after it, before it or both", "intro.wav \"techno music\" --seconds 10"),
    SUPER_RESOLUTION: ("regenerate the highest frequencies", "telephone.wav --above 3400"),
    VARIATIONS: ("make sounds that resemble one", "bell.wav --num-waveforms 5 --strength 0.4"),
    RECONSTRUCT: ("send a sound through the model and back, and measure what is lost",
                  "bell.wav --stage vae --plot bell.png"),
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser's."""
    for task, (what, example) in COMMANDS.items():
        name = task.replace("_", "-")
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.",
                                      epilog=f"For example: ldm2 {name} {example}")
        command.add_argument("input", metavar="IN", help="sound file of any format, rate and number of channels")
        if task == RECONSTRUCT:
            command.add_argument("--prompt", nargs=1, default=[], metavar="TEXT",
                                 help="guides the stage diffusion (default: nothing does)")
            command.add_argument("--plot", metavar="FILE.png", help="draw the spectrograms of input, output and "
                                 "difference")
        else:
            options.add_prompt(command, "what to hear (default: the input alone guides)")
        options.add_settings(command, task)
        options.add_output(command, "input's name")
        options.add_model_options(command)
        command.set_defaults(run=reconstruct if task == RECONSTRUCT else edit, task=task)


def edit(args: argparse.Namespace) -> None:
    """Run the edit that the command is named after, and write what comes out."""
    given, sound = _given(args), _opened(args)
    settings = _checked(given, sound, args.task)
    kept = {"channels": len(sound.channels), "sample_rate": sound.sample_rate} if settings.keep_format else {}
    target = output.Target.of(args, _stem(args), settings.candidates, inputs=[args.input], **kept)
    pipe = options.load(args)
    start = time.perf_counter()
    with output.watched(pipe, args, Settings.create(args.task, **given).resolved(pipe.defaults).steps) as progress:
        result = getattr(pipe, args.task)(sound, **given, progress=progress)
    output.write(result, target, args, time.perf_counter() - start)


def reconstruct(args: argparse.Namespace) -> None:
    """Through the model and back; prints the distances."""
    given, sound = _given(args), _opened(args)
    _checked(given, sound, args.task)
    target = output.Target.of(args, _stem(args), 1, inputs=[args.input])
    if args.plot is not None:
        from ldm2.audio import plot

        plot.check_plot(args.plot, args.overwrite, inputs=[args.input])
    pipe = options.load(args)
    result = pipe.reconstruct(sound, **given, progress=not args.quiet)
    output.write_sound(result.waveform[None], result.sample_rate, target, args, sound.encoding)
    if args.plot is not None:
        plot.compare(args.plot, result.original, result.waveform, result.sample_rate, overwrite=args.overwrite)
    if not args.quiet:                                     # beside a WAV on stdout they go to stderr
        for name, value in result.distances.items():
            print(f"{name.replace('_', ' '):<22}{value:9.4f} {UNITS[name]}".rstrip(),
                  file=sys.stderr if target.path is None else sys.stdout)
    output.print_paths([] if target.path is None else [target.path])


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options on the command line, and the prompt."""
    prompt = options.one_prompt(args.prompt)
    return options.given(args, Settings, args.task) | ({} if prompt is None else {"prompt": prompt})


def _checked(given: dict[str, Any], sound: Sound, task: str) -> Settings:
    """The settings, held against the sound, so that what is wrong is refused before gigabytes are loaded."""
    from ldm2.edit.edits import check_duration
    from ldm2.edit.masks import merge_ranges

    settings = Settings.create(task, **given)
    options.check_loras(settings)
    if task == INPAINT and settings.times is None and settings.bands is None:
        raise ValueError("inpaint needs --time FROM:TO, --band FROM:TO, or both")
    if task == SUPER_RESOLUTION and settings.above is None:
        raise ValueError("super-resolution needs --above HZ")
    length = settings.resolved().length(sound.seconds)
    check_duration(length)
    if settings.times is not None:
        merge_ranges(settings.times, sound.seconds)
    return settings.resolved(duration=length)


def _opened(args: argparse.Namespace) -> Sound:
    """The input, read whole, so that what is wrong with it is told before gigabytes are loaded."""
    from ldm2.edit.sound import open_sound

    try:
        return open_sound(args.input, channel=args.channel)
    except FileNotFoundError as error:
        if args.prompt and Path(args.prompt[0]).is_file():
            raise ValueError(f"{error}; {args.prompt[0]} does: the file comes first, then the prompt") from error
        raise


def _stem(args: argparse.Namespace) -> str:
    """What names the output by default."""
    return f"{Path(args.input).stem} {args.command}"
