"""What a command that makes sound says and writes: advice before the work, the file, its path, and what was done."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm2 import atomic, audio
from ldm2.cli import options
from ldm2.result import output_paths
from ldm2.settings import PRESETS, Output

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm2.pipeline import AudioLDM2
    from ldm2.result import Result
    from ldm2.runtime.progress import Progress

DEMO = (
    "\"tiny\" is a demo model; for real audio omit --model: cvssp/audioldm2 (4.5 GB, non-commercial license) is "
    "downloaded on first use. `ldm2 models` lists others."
)
BFLOAT16 = "this CPU has instructions for bfloat16: --dtype bfloat16 is likely to be faster, at half the memory"
KERNELS = ("the kernels for the CPU are not built, with which ldm2 is about 1.8 times as fast: run python -m "
           "ldm2.build_kernels once (a minute, needs g++), or set LDM2_KERNELS=auto")
FAST = "{steps} steps take a while on a CPU: --preset fast takes {fast} steps of a better solver"
MANY_STEPS = 100
LONGEST_STEM = 60                          # characters
LONGEST_STEM_BYTES = 180                   # of 255 that a file name may have


@dataclass
class Target:
    """Where a result goes.

    path:   the file; None is stdout
    chosen: the text that the name was made from, where it was not given: such a name may be made again
    """

    path: Path | None
    overwrite: bool
    count: int = 1
    chosen: str | None = None

    @classmethod
    def of(
        cls, args: argparse.Namespace, text: str, count: int, *, inputs: Sequence[str | Path] = (), **sound: Any
    ) -> Target:
        """The place that the options of a command name, checked. text: what names the file by default; count: files.

        inputs, sound: what is known of it, as of audio.check_output; the options for the file say more. FOLDER/ need
        not exist, but its parent must: `make_folder` makes it. Raises ValueError or OSError for a place that does not
        do, and for a rate or a subtype that the format does not have.
        """
        sound |= _asked_for(args)
        if args.output == "-":
            if count > 1:
                raise ValueError(f"stdout takes one waveform, got {count}: give -o FILE")
            audio.check_format("-.wav", **sound)
            return cls(None, args.overwrite)
        given = None if args.output is None else Path(args.output).expanduser()
        folder = given if given is not None and (given.is_dir() or str(args.output).endswith(("/", os.sep))) else None
        if given is not None and folder is None:
            target = cls(given, args.overwrite, count)
        else:
            target = cls(free_name(folder or Path(), text, count, args.overwrite), args.overwrite, count, text)
        if folder is not None and not folder.is_dir():
            atomic.check_writable(folder)
            audio.check_format(target.path, **sound)
            return target
        for path in output_paths(target.path, count):
            audio.check_output(path, args.overwrite, inputs=inputs, **sound)
        return target

    def make_folder(self) -> None:
        """Make the folder of a name that was made from a text, now that there is something to put into it."""
        if self.chosen is not None:
            self.path.parent.mkdir(exist_ok=True)

    def save(self, result: Result, **form: Any) -> list[Path]:
        """Write the result; under another name if a chosen one has been taken in the meantime."""
        self.make_folder()
        while True:
            try:
                return result.save(self.path, self.overwrite, **form)
            except FileExistsError:
                if self.chosen is None:
                    raise
                self.path = free_name(self.path.parent, self.chosen, self.count, self.overwrite)


def _asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """What the options for the file say of it, as arguments of audio.check_format."""
    form = Output(**options.given(args, Output))
    told = {"sample_rate": form.sample_rate, "encoding": form.encoding}
    return {name: value for name, value in told.items() if value is not None}


def free_name(folder: Path, text: str, count: int, overwrite: bool, suffix: str = ".wav") -> Path:
    """A file name made from a text, with a number where it (or one of the `count` names of a set) is taken."""
    words = "-".join(re.findall(r"\w+", unicodedata.normalize("NFC", text.lower())))[:LONGEST_STEM]
    stem = words.encode()[:LONGEST_STEM_BYTES].decode(errors="ignore").strip("-_") or "sound"
    for name in itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2))):
        path = folder / (name + suffix)
        if overwrite or not any(os.path.lexists(each) for each in output_paths(path, count)):
            return path
    raise AssertionError("itertools.count ends")


def write(result: Result, target: Target, args: argparse.Namespace, elapsed: float) -> None:
    """Write the files, say what was done on stderr, and print their paths on stdout."""
    form = options.given(args, Output)
    if target.path is None:
        _to_stdout(result.to_wav(**form))
        paths = []
    else:
        paths = target.save(result, **form)
    if not args.quiet:
        report(result, elapsed)
    print_paths(paths)


def write_sound(
    channels: np.ndarray, sample_rate: int, target: Target, args: argparse.Namespace, encoding: str | None
) -> None:
    """Write samples (channels, N) at sample_rate (Hz); encoding: of an input whose precision is kept."""
    from ldm2.audio.finish import finish

    form = Output(**options.given(args, Output))
    samples, rate = finish(channels, sample_rate, form)
    encoding = form.encoding or audio.nearest_encoding(target.path or "-.wav", encoding)
    if target.path is None:
        _to_stdout(audio.to_wav(samples, rate, encoding=encoding))
        return
    target.make_folder()
    audio.write(target.path, samples, rate, overwrite=args.overwrite, encoding=encoding)


def _to_stdout(wav: bytes) -> None:
    """A WAV file to stdout."""
    sys.stdout.buffer.write(wav)
    sys.stdout.buffer.flush()


def print_paths(paths: list[Path]) -> None:
    """Print the written paths, the last lines of stdout. The files are the result: a reader that left is no failure."""
    with suppress(BrokenPipeError):
        for path in paths:
            try:
                print(path)
            except UnicodeEncodeError:
                print(os.fsencode(path).decode("ascii", "backslashreplace"))
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())           # else the flush at exit fails once more


@contextmanager
def watched(pipe: AudioLDM2, args: argparse.Namespace, steps: int) -> Iterator[bool | Progress]:
    """What to hand over as `progress`: a bar or lines, and before them, when all checks are passed, some advice."""
    from ldm2.runtime.progress import shown

    if args.quiet:
        yield False
        return
    with shown(True) as display:
        advice = [functools.partial(advise, pipe, args.dtype, steps)]

        def report(stage: str, done: int, total: int) -> None:
            while advice:
                advice.pop()()
            display(stage, done, total)

        yield report


def advise(pipe: AudioLDM2, dtype: str, steps: int) -> None:
    """Say what would make it faster, or better. dtype: what --dtype was."""
    from ldm2.runtime.device import multiplies_bfloat16

    if pipe.origin["model"] == "tiny":
        say(DEMO)
        return
    if lacks_kernels(pipe.device):
        say(KERNELS)
    if dtype == "auto" and pipe.origin["dtype"] == "float32" and multiplies_bfloat16(pipe.device):
        say(BFLOAT16)
    if steps >= MANY_STEPS and pipe.device.type == "cpu":
        say(FAST.format(steps=steps, fast=PRESETS["fast"]["steps"]))


def say(text: str) -> None:
    """A line on stderr."""
    print(f"ldm2: {text}", file=sys.stderr)


def lacks_kernels(device: torch.device) -> bool:
    """Whether a model runs at half speed there because the kernels for the CPU, which could be built, are not."""
    from ldm2 import ops

    if device.type != "cpu" or sys.platform != "linux" or os.environ.get("LDM2_KERNELS"):
        return False
    if ops.ldm2_kernels is None:
        return True
    from ldm2_kernels import cpu

    return cpu.library() is None


def report(result: Result, elapsed: float) -> None:
    """One line on stderr: what was written, how long it is, how fast it was made."""
    count, seconds = len(result), result.waveforms.shape[-1] / result.sample_rate
    ranked = result.scores is not None
    what = "1 waveform" if count == 1 else f"{count} waveforms{', best first,' if ranked else ''}"
    if result.settings.get("loop"):
        what += ", seamless loop," if count == 1 else " seamless loops,"
    about = [f"model {result.settings['model']}", f"seed {', '.join(map(str, result.seeds))}"]
    if ranked:
        about.append(f"score {', '.join(f'{score:.3f}' for score in result.scores)}")
    print(f"wrote {what} of {seconds:.2f} s at {result.sample_rate} Hz ({', '.join(about)}) in {elapsed:.1f} s, "
          f"{elapsed / (count * seconds):.2f} s per second of sound", file=sys.stderr)
