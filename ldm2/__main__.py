"""The command line: `ldm2` and `python -m ldm2`. argparse here, one function per subcommand; nothing heavy is imported
before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from pathlib import Path

from ldm2 import __version__, audio
from ldm2.recipe import DEFAULTS

SAMPLERS = ("ddim", "ddpm", "pndm", "lms", "euler", "euler-ancestral", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all our errors are."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def generate(args: argparse.Namespace) -> None:
    """Prompt -> sound file(s)."""
    target = Path(args.output) if args.output else free_name(args.prompt)
    from ldm2.result import output_paths

    for path in output_paths(target, max(1, args.num_waveforms)):
        audio.check_output(path, overwrite=args.overwrite)

    import ldm2

    pipe = ldm2.load(
        args.model, device=args.device, dtype=args.dtype, reference=args.reference, revision=args.revision,
        local_files_only=args.local_files_only,
    )
    start = time.perf_counter()
    result = pipe.generate(
        args.prompt, args.negative_prompt, seconds=args.seconds, steps=args.steps, guidance_scale=args.guidance_scale,
        sampler=args.sampler, eta=args.eta, seed=args.seed, num_waveforms=args.num_waveforms,
        progress=sys.stderr.isatty() and not args.quiet,
    )
    elapsed = time.perf_counter() - start
    paths = result.save(target, overwrite=args.overwrite)
    if not args.quiet:
        report(result, pipe, elapsed)
    for path in paths:
        print(path)


def report(result, pipe, elapsed: float) -> None:
    """One line on stderr: what was written, how long it is, how fast it was made."""
    count, samples = result.waveforms.shape
    seconds = samples / result.sample_rate
    what = "1 waveform" if count == 1 else f"{count} waveforms, best first,"
    seeds = ", ".join(map(str, result.seeds))
    print(
        f"wrote {what} of {seconds:.2f} s at {result.sample_rate} Hz (model {pipe.origin['model']}, seed {seeds}) "
        f"in {elapsed:.1f} s, {elapsed / (count * seconds):.2f} s per second of sound",
        file=sys.stderr,
    )


def models(args: argparse.Namespace) -> None:
    """Table of known checkpoints."""
    from ldm2.models import table

    print(table())


def download(args: argparse.Namespace) -> None:
    """Fetch a checkpoint into the hub's cache."""
    from ldm2 import hub

    print(hub.resolve(args.model, revision=args.revision))


def info(args: argparse.Namespace) -> None:
    """Parts, parameters, dtypes and heads of a checkpoint, read from its configs and headers."""
    from ldm2 import hub, weights

    print(weights.describe(hub.resolve(args.model, revision=args.revision, local_files_only=args.local_files_only)))


def free_name(prompt: str, suffix: str = ".wav") -> Path:
    """A file name in the current folder made from the prompt, with a number if that one is taken."""
    stem = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60].strip("-") or "sound"
    path, number = Path(stem + suffix), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}{suffix}"), number + 1
    return path


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(prog="ldm2", description="AudioLDM2: text in, sound, music or speech out.")
    top.add_argument("--version", action="version", version=f"ldm2 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    command = commands.add_parser("generate", help="make sound from a prompt", description="Make sound from a prompt.")
    command.add_argument("prompt", help="what to hear, for example \"a dog barking in the rain\"")
    command.add_argument("-o", "--output", metavar="FILE", help="file to write; the suffix names the format "
                         "(default: a name made from the prompt, .wav, in the current folder)")
    command.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    add_model_options(command)
    command.add_argument("--seconds", type=float, help=f"length (default: {DEFAULTS['seconds']}, or the model's own)")
    command.add_argument("--steps", type=int, help=f"sampler steps (default: {DEFAULTS['steps']}, or the model's own)")
    command.add_argument("--guidance-scale", type=float, metavar="SCALE",
                         help=f"how strictly to follow the prompt; 1 or less: not at all (default: "
                         f"{DEFAULTS['guidance_scale']}, or the model's own)")
    command.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    command.add_argument("--sampler", choices=SAMPLERS, metavar="NAME",
                         help=f"one of: {', '.join(SAMPLERS)} (default: {DEFAULTS['sampler']})")
    command.add_argument("--eta", type=float, default=0.0, help="share of fresh noise in ddim, 0 to 1 (default: 0)")
    command.add_argument("--seed", type=int, help="number that fixes the noise (default: drawn, and printed)")
    command.add_argument("--num-waveforms", type=int, default=1, metavar="N",
                         help="candidates, written best first by CLAP similarity (default: 1)")
    command.add_argument("-q", "--quiet", action="store_true", help="print the written path only")
    command.set_defaults(run=generate)

    command = commands.add_parser("models", help="list the known checkpoints")
    command.set_defaults(run=models)

    command = commands.add_parser("download", help="fetch a checkpoint, to work offline later")
    command.add_argument("model", help="short name or hub name")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.set_defaults(run=download)

    command = commands.add_parser("info", help="describe a checkpoint: parts, parameters, dtype, heads")
    command.add_argument("model", help="short name, hub name or folder")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")
    command.set_defaults(run=info)
    return top


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where and how it runs."""
    command.add_argument("--model", default="cvssp/audioldm2", help="short name, hub name or folder; \"tiny\" is "
                         "bundled and needs no network (default: %(default)s)")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--local-files-only", action="store_true", help="use the cache, never the network")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    command.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default: auto)")
    command.add_argument("--reference", default="authors", help="whose arithmetic to reproduce: authors or diffusers "
                         "(default: authors; see weights.md)")


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the computation failed, 2 bad input, 130 stopped by Ctrl-C."""
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
