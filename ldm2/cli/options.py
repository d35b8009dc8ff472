"""What the commands of the command line have in common: options, and what they say when they are done.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm2.settings import DEFAULTS, PRESETS

if TYPE_CHECKING:
    import torch

    from ldm2.pipeline import AudioLDM2
    from ldm2.result import Result

TOY = (
    "tiny is a toy trained on formulas; for the real sound leave --model away: cvssp/audioldm2 (4.5 GB, non-commercial "
    "licence) is then fetched once. `ldm2 models` lists others."
)
BFLOAT16 = "this CPU has instructions for bfloat16: --dtype bfloat16 is likely to be faster, at half the memory"
KERNELS = ("the kernels for the CPU are not built, with which ldm2 is about 1.8 times as fast: run python -m "
           "ldm2.build_kernels once (a minute, needs g++), or set LDM2_KERNELS=auto")
SAMPLERS = ("ddim", "ddpm", "pndm", "lms", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc")
SPACINGS = ("leading", "trailing", "linspace")


def add_output_options(command: argparse.ArgumentParser, source: str) -> None:
    """Where the result goes, and how much is said."""
    command.add_argument("-o", "--output", metavar="FILE", help="file to write; the suffix names the format "
                         f"(default: a name made from the {source}, .wav, in the current folder)")
    command.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    how_much = command.add_mutually_exclusive_group()
    how_much.add_argument("-q", "--quiet", action="store_true", help="print the written path only")
    how_much.add_argument("-v", "--verbose", action="store_true", help="tell the time and the memory of each stage")


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where and how it runs."""
    command.add_argument("--model", default="cvssp/audioldm2", help="short name, hub name or folder; \"tiny\" is "
                         "bundled and needs no network (default: cvssp/audioldm2)")
    add_source_options(command)
    command.add_argument("--tokenizers", metavar="FOLDER", help="for authors' .pth files: a folder with tokenizer and "
                         "tokenizer_2 (default: their own hub repositories)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    command.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default: auto)")
    command.add_argument("--reference", default="authors", help="whose arithmetic to reproduce: authors or diffusers "
                         "(default: authors; see weights.md)")
    command.add_argument("--low-memory", action="store_true", help="hold only the part of the model in memory that is "
                         "at work: the same sound, and the time to read each part anew")
    command.add_argument("--compile", action="store_true", help="compile the model's step with torch.compile at its "
                         "first call, which takes minutes")


def add_source_options(command: argparse.ArgumentParser) -> None:
    """Which version of a checkpoint on the hub."""
    add_revision_options(command)
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")


def add_revision_options(command: argparse.ArgumentParser) -> None:
    """Which of the files that a repository holds."""
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--variant", metavar="WORD", help="in the names of the weight files to take, for example fp16 "
                         "for model.fp16.safetensors")


def add_speech_options(command: argparse.ArgumentParser) -> None:
    """What speech models say."""
    command.add_argument("--transcription", metavar="TEXT", help="what a speech model says, in English; needs "
                         "phonemizer and espeak-ng")
    command.add_argument("--phonemes", metavar="IPA", help="the same as ready phonemes, which need neither")


def add_sampling_options(command: argparse.ArgumentParser, candidates: int | None = 1) -> None:
    """How the diffusion runs. candidates: the default of --num-waveforms, None for a command without it."""
    command.add_argument("--steps", type=int, help=f"sampler steps (default: {DEFAULTS['steps']}, or the model's own)")
    command.add_argument("--guidance-scale", type=float, metavar="SCALE",
                         help=f"how strictly to follow the prompt; 1 or less: not at all (default: "
                         f"{DEFAULTS['guidance_scale']}, or the model's own)")
    command.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    command.add_argument("--sampler", choices=SAMPLERS, metavar="NAME",
                         help=f"one of: {', '.join(SAMPLERS)} (default: {DEFAULTS['sampler']})")
    command.add_argument("--preset", choices=PRESETS, metavar="NAME", help="values for what is not given here: "
                         f"{'; '.join(map(_told, PRESETS))}")
    command.add_argument("--guidance-interval", type=interval, metavar="FROM:TO", help="guidance in this part of the "
                         "run only, which goes from 0 (noise) to 1 (sound), for example 0.1:0.8; other steps cost half "
                         "(default: all of it)")
    command.add_argument("--reuse", type=int, metavar="N", help="compute the deep part of the model in every N-th step "
                         "and reuse it in between: faster and less exact (default: 1)")
    command.add_argument("--spacing", choices=SPACINGS, metavar="NAME", help="of the timesteps: leading, trailing "
                         "(starts at the last one of the training, which leading misses the more the fewer the steps) "
                         "or linspace (default: the model's own)")
    command.add_argument("--eta", type=float, default=0.0, help="share of fresh noise in ddim, 0 to 1 (default: 0)")
    command.add_argument("--seed", type=int, help="number that fixes the noise, 0 to 2**64 - 1; -1 is "
                         "2**64 - 1, as in torch (default: drawn, and printed)")
    if candidates is not None:
        command.add_argument("--num-waveforms", type=int, default=candidates, metavar="N", help="candidates, written "
                             "best first by CLAP similarity with the prompt (default: %(default)s)")


def add_time_options(command: argparse.ArgumentParser) -> None:
    """Sounds longer than the model's own length, prompts over time, loops."""
    command.add_argument("--prompt-at", type=prompt_at, action="append", default=[], metavar="SECONDS:PROMPT",
                         help="from this time on the sound follows another prompt; may be given several times; "
                         "0:PROMPT takes the place of PROMPT")
    command.add_argument("--loop", action="store_true", help="make the end go on at the start; the length is rounded "
                         "to whole frames of the model (0.04 s at 16 kHz)")
    add_window_options(command)


def add_window_options(command: argparse.ArgumentParser) -> None:
    """How sounds longer than the model's own length are split."""
    command.add_argument("--window", type=float, metavar="SECONDS", help="longer sounds are made in overlapping "
                         "windows of this length (default: the length that the model was trained on)")
    command.add_argument("--overlap", type=float, metavar="SECONDS",
                         help="what neighbouring windows share (default: a quarter of a window)")


def prompt_at(text: str) -> tuple[float, str]:
    """"20:thunder" -> (20.0, "thunder"), for argparse."""
    start, _, prompt = text.partition(":")
    try:
        return float(start), prompt
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be SECONDS:PROMPT, for example 20:thunder, got {text!r}") from None


def _told(preset: str) -> str:
    """A preset in words."""
    values = PRESETS[preset]
    start, end = values["guidance_interval"]
    return (f"{preset} is {values['sampler']} in {values['steps']} steps, {values['spacing']}, "
            f"with guidance in {start:g}:{end:g}")


def interval(text: str) -> tuple[float, float]:
    """"0.1:0.8" -> (0.1, 0.8), for argparse; the ends of the run where nothing stands before or after the colon."""
    start, colon, end = text.partition(":")
    try:
        return float(start or 0), float(end if end or not colon else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FROM:TO, for example 0.1:0.8, got {text!r}") from None


def prompts(args: argparse.Namespace) -> tuple[str, list[tuple[float, str]]]:
    """The prompt to begin with, and those that follow. Raises ValueError if there is none for the beginning."""
    if args.prompt is not None:
        return args.prompt, args.prompt_at
    if not args.prompt_at or args.prompt_at[0][0] != 0:
        raise ValueError("a prompt is needed for the beginning: PROMPT, or --prompt-at 0:PROMPT")
    return args.prompt_at[0][1], args.prompt_at[1:]


def sampling(args: argparse.Namespace) -> dict:
    """The settings of add_sampling_options as arguments of AudioLDM2.generate and of the edits."""
    names = ("steps", "guidance_scale", "negative_prompt", "sampler", "eta", "seed", "num_waveforms", "preset",
             "guidance_interval", "reuse", "spacing")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def load(args: argparse.Namespace) -> AudioLDM2:
    """The checkpoint of add_model_options. With --verbose its stages report to stderr from here on."""
    import ldm2

    if args.verbose:
        logging.getLogger("ldm2").setLevel(logging.INFO)
    return ldm2.load(
        args.model, device=args.device, dtype=args.dtype, reference=args.reference, revision=args.revision,
        local_files_only=args.local_files_only, tokenizers=args.tokenizers, low_memory=args.low_memory,
        compile=args.compile, variant=args.variant,
    )


def lacks_kernels(device: torch.device) -> bool:
    """Whether a model runs at half speed there because the kernels for the CPU, which could be built, are not."""
    from ldm2 import ops

    if device.type != "cpu" or sys.platform != "linux" or os.environ.get("LDM2_KERNELS"):
        return False
    if ops.ldm2_kernels is None:
        return True
    from ldm2_kernels import cpu

    return cpu.library() is None


def progress(args: argparse.Namespace) -> bool:
    """Whether to show a progress bar."""
    return sys.stderr.isatty() and not args.quiet


def report(result: Result, pipe: AudioLDM2, elapsed: float, dtype: str) -> None:
    """One line on stderr: what was written, how long it is, how fast it was made; one more for each advice.

    dtype: what --dtype was.
    """
    from ldm2.loading import multiplies_bfloat16

    count, seconds = len(result.waveforms), result.waveforms.shape[-1] / result.sample_rate
    order = ", best first," if result.scores is not None else ""
    what = "1 waveform" if count == 1 else f"{count} waveforms{order}"
    if result.settings.get("loop"):
        what += ", seamless loop," if count == 1 else " seamless loops,"
    seeds = ", ".join(map(str, result.seeds))
    print(
        f"wrote {what} of {seconds:.2f} s at {result.sample_rate} Hz (model {pipe.origin['model']}, seed {seeds}) "
        f"in {elapsed:.1f} s, {elapsed / (count * seconds):.2f} s per second of sound",
        file=sys.stderr,
    )
    if pipe.origin["model"] == "tiny":
        print(TOY, file=sys.stderr)
    elif dtype == "auto" and multiplies_bfloat16(pipe.device):
        print(BFLOAT16, file=sys.stderr)
    if lacks_kernels(pipe.device):
        print(KERNELS, file=sys.stderr)


def name_for(text: str, overwrite: bool, suffix: str = ".wav") -> Path:
    """A file name in the current folder made from a text; with a number if that one is taken and is to be kept."""
    stem = "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:60].strip("-") or "sound"
    path, number = Path(stem + suffix), 2
    while path.exists() and not overwrite:
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path
