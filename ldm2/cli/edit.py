"""The commands that take a sound: transfer, inpaint, extend, super-resolution, variations, reconstruct."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ldm2 import audio
from ldm2.cli import options

if TYPE_CHECKING:
    from ldm2.edit.sound import Sound

UNITS = {
    "log_mel_distance": "(natural log)", "spectral_convergence": "", "multi_resolution_stft": "",
    "level_difference": "dB",
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser's. The options of a command itself stand before those that all of them have."""
    command = _command(commands, "transfer", "give a sound the content of a prompt", transfer, "PROMPT",
                       "rain.wav \"applause\" --strength 0.6")
    _add_strength(command, 0.6)
    _add_shared(command, 1)

    command = _command(commands, "inpaint", "make parts of a sound anew, and keep the rest as it is", inpaint,
                       "PROMPT", "street.wav \"a dog barking\" --time 2.5:4 --time 7:8")
    command.add_argument("--time", action="append", metavar="FROM:TO", help="seconds to make anew, for example 2.5:4, "
                         "3: or :3; may be given several times")
    command.add_argument("--band", action="append", metavar="FROM:TO", help="Hz to make anew, within the times if both "
                         "are given; may be given several times")
    command.add_argument("--soft-seconds", type=float, default=0.0, metavar="S", help="let the change set in over this "
                         "time, inside each border of a time (default: 0)")
    _add_soft_hz(command)
    _add_joint(command, crossfade=True)
    _add_shared(command, 1)

    command = _command(commands, "extend", "continue a sound: more after it, before it or both", extend, "PROMPT",
                       "intro.wav \"techno music\" --seconds 10 --side after")
    command.add_argument("--seconds", type=float, default=10.0, help="how much to add (default: %(default)g)")
    command.add_argument("--side", choices=("after", "before", "both"), default="after",
                         help="after, before, or both, then as many seconds on each side (default: after)")
    _add_joint(command, crossfade=True)
    _add_shared(command, 1)

    command = _command(commands, "super-resolution", "make the highest frequencies anew", super_resolution, "[PROMPT]",
                       "telephone.wav --above 3400")
    command.add_argument("--above", type=float, required=True, metavar="HZ", help="from where on, for example 4000; "
                         "what lies beyond the model's own range stays as it is")
    _add_soft_hz(command)
    _add_joint(command, crossfade=False)
    _add_shared(command, 1)

    command = _command(commands, "variations", "make sounds that resemble one", variations, "[PROMPT]",
                       "bell.wav --num-waveforms 5 --strength 0.4")
    _add_strength(command, 0.5)
    _add_shared(command, 3)

    command = _command(commands, "reconstruct", "send a sound through the model and back, and measure what is lost",
                       reconstruct, None, "bell.wav --stage vae --plot bell.png")
    command.add_argument("--stage", choices=("vocoder", "vae", "diffusion"), default="vae",
                         help="how far in: vocoder (mel and back), vae (latents and back) or diffusion (noised to "
                         "the strength and denoised) (default: vae)")
    command.add_argument("--prompt", metavar="TEXT", help="guides the stage diffusion (default: nothing does)")
    command.add_argument("--plot", metavar="FILE.png", help="draw the spectrograms of input, output and difference")
    _add_strength(command, 0.3, "of the stage diffusion: ")
    _add_shared(command, None)


def _command(
    commands: argparse._SubParsersAction, name: str, what: str, run, prompt: str | None, example: str
) -> argparse.ArgumentParser:
    """A command. prompt: its name in the usage; in brackets if optional. example: arguments that make sense."""
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.",
                                  epilog=f"For example: ldm2 {name} {example}")
    command.add_argument("input", metavar="IN", help="sound file of any format, rate and number of channels")
    if prompt is not None:
        optional = {"nargs": "?"} if prompt.startswith("[") else {}
        what = "what to hear (default: the input alone guides)" if optional else "what to hear"
        command.add_argument("prompt", metavar="PROMPT", help=what, **optional)
    command.set_defaults(run=run)
    return command


def _add_shared(command: argparse.ArgumentParser, candidates: int | None) -> None:
    """The options that all have. candidates: the default of --num-waveforms, None for a command without it."""
    command.add_argument("--channel", type=int, metavar="N", help="channel that the model hears, from 0 (default: the "
                         "mean of all)")
    if candidates is not None:
        command.add_argument("--keep-format", action="store_true", help="write the input's own rate and channels, what "
                             "is new alike in all of them (default: one channel at the model's rate)")
        command.add_argument("--prompt-at", type=options.prompt_at, action="append", default=[],
                             metavar="SECONDS:PROMPT", help="from this time of the result on another prompt holds; may "
                             "be given several times")
    options.add_output_options(command, "input's name")
    options.add_sampling_options(command.add_argument_group("how the diffusion runs"), candidates)
    options.add_window_options(command.add_argument_group("sounds longer than the model's own length"))
    options.add_speech_options(command.add_argument_group("speech models"))
    options.add_model_options(command.add_argument_group("the model"))


def _add_strength(command: argparse.ArgumentParser, default: float, of: str = "") -> None:
    command.add_argument("--strength", type=float, default=default, help=f"{of}0 keeps the input, as the model "
                         "reconstructs it, 1 ignores it (default: %(default)g)")


def _add_soft_hz(command: argparse.ArgumentParser) -> None:
    command.add_argument("--soft-hz", type=float, default=0.0, metavar="HZ", help="let the change set in over this "
                         "width, inside each border of a band (default: 0)")


def _add_joint(command: argparse.ArgumentParser, crossfade: bool) -> None:
    if crossfade:
        command.add_argument("--crossfade", type=float, default=0.02, metavar="S", help="seconds over which input and "
                             "new sound fade into each other (default: %(default)g)")
    command.add_argument("--no-paste", dest="paste", action="store_false", help="write what the model makes of "
                         "everything, instead of the input's own samples where nothing was to change")


def transfer(args: argparse.Namespace) -> None:
    """Noise a sound to a strength and denoise it under a prompt."""
    _check_strength(args)
    _edit(args, _opened(args), strength=args.strength)


variations = transfer


def inpaint(args: argparse.Namespace) -> None:
    """Make ranges of time and frequency anew."""
    from ldm2.edit.edits import check_lengths
    from ldm2.edit.masks import merge_ranges, parse_range

    sound = _opened(args)
    if args.time is None and args.band is None:
        raise ValueError("inpaint needs --time FROM:TO, --band FROM:TO, or both")
    times, bands = ([parse_range(text) for text in given] if given else None for given in (args.time, args.band))
    if times is not None:
        times = merge_ranges(times, sound.seconds)
    check_lengths(crossfade=args.crossfade, soft_seconds=args.soft_seconds, soft_hz=args.soft_hz)
    _edit(args, sound, times=times, bands=bands, soft_seconds=args.soft_seconds, soft_hz=args.soft_hz,
          crossfade=args.crossfade, paste=args.paste)


def extend(args: argparse.Namespace) -> None:
    """Continue a sound on one side or both."""
    from ldm2.edit.edits import check_lengths
    from ldm2.settings import check_seconds

    sound, seconds = _opened(args), check_seconds(args.seconds)
    check_lengths(crossfade=args.crossfade)
    length = sound.seconds + seconds * (2 if args.side == "both" else 1)
    _edit(args, sound, length, seconds=seconds, side=args.side, crossfade=args.crossfade, paste=args.paste)


def super_resolution(args: argparse.Namespace) -> None:
    """Make what lies above a frequency anew."""
    from ldm2.edit.edits import check_lengths

    sound = _opened(args)
    check_lengths(above=args.above, soft_hz=args.soft_hz)
    _edit(args, sound, above=args.above, soft_hz=args.soft_hz, paste=args.paste)


def reconstruct(args: argparse.Namespace) -> None:
    """Through the model and back; prints the distances."""
    _check_strength(args)
    sound, target = _opened(args), _target(args)
    if args.plot is not None:
        from ldm2.audio import plot

        plot.check_plot(args.plot, args.overwrite, inputs=[args.input])
    pipe = options.load(args)
    settings = _settings(args) | {"progress": options.progress(args)} if args.stage == "diffusion" else {}
    result = pipe.reconstruct(
        args.input, args.stage, strength=args.strength, prompt=args.prompt, channel=args.channel, **settings
    )
    encoding = audio.nearest_encoding(target, sound.encoding)
    audio.write(target, result.waveform, result.sample_rate, overwrite=args.overwrite, encoding=encoding)
    if args.plot is not None:
        plot.compare(args.plot, result.original, result.waveform, result.sample_rate, overwrite=args.overwrite)
    if not args.quiet:
        for name, value in result.distances.items():
            print(f"{name.replace('_', ' '):<22}{value:9.4f} {UNITS[name]}".rstrip())
    print(target)


def _settings(args: argparse.Namespace) -> dict:
    """The settings of generation that edits have too."""
    names = ("window", "overlap", "transcription", "phonemes", "prompt_at")
    return options.sampling(args) | {name: getattr(args, name) for name in names if hasattr(args, name)}


def _check_strength(args: argparse.Namespace) -> None:
    from ldm2.edit.masks import start_step

    start_step(args.strength, 1)


def _opened(args: argparse.Namespace) -> Sound:
    """The input, read whole, so that what is wrong with it is told before gigabytes are loaded."""
    from ldm2.edit.sound import open_sound

    try:
        return open_sound(args.input, channel=args.channel)
    except FileNotFoundError as error:
        prompt = getattr(args, "prompt", None)
        if prompt and Path(prompt).is_file():
            raise ValueError(f"{error}; {prompt} does: the file comes first, then the prompt") from error
        raise


def _target(args: argparse.Namespace, count: int = 1, channels: int = 1, sample_rate: int | None = None) -> Path:
    """The file to write, checked; never the input. sample_rate: in Hz, as far as it is known."""
    from ldm2.result import output_paths

    stem = f"{Path(args.input).stem} {args.command}"
    target = Path(args.output) if args.output else options.name_for(stem, args.overwrite)
    for path in output_paths(target, max(1, count)):
        audio.check_output(path, args.overwrite, sample_rate=sample_rate, channels=channels, inputs=[args.input])
    return target


def _edit(args: argparse.Namespace, sound: Sound, length: float | None = None, **choices) -> None:
    """Run the edit that the command is named after, and write what comes out. length: in s, if not the input's."""
    from ldm2.edit.edits import check_duration
    from ldm2.settings import recipe

    settings, length = _settings(args), sound.seconds if length is None else length
    check_duration(length)
    recipe("sound" if args.prompt is None else args.prompt, seconds=length, **settings)
    kept = {"channels": len(sound.channels), "sample_rate": sound.sample_rate} if args.keep_format else {}
    target = _target(args, args.num_waveforms, **kept)
    pipe = options.load(args)
    start = time.perf_counter()
    edit = getattr(pipe, args.command.replace("-", "_"))
    result = edit(args.input, args.prompt, channel=args.channel, keep_format=args.keep_format,
                  progress=options.progress(args), **choices, **settings)
    elapsed = time.perf_counter() - start
    paths = result.save(target, overwrite=args.overwrite)
    if not args.quiet:
        options.report(result, pipe, elapsed, args.dtype)
    for path in paths:
        print(path)
