"""The commands `ldm2 train ...`: a model learns from sounds with captions."""

from __future__ import annotations

import argparse

from ldm2.cli import options
from ldm2.cli.output import say
from ldm2.options import options_of
from ldm2.training.options import DISTILL, FINETUNE, LORA, Training

SOUNDS = ("a folder with x.wav and its captions in x.txt; a folder with metadata.csv or .jsonl, or of ldm2 batch; or a "
          "table of paths and captions .json, .jsonl, .csv, .parquet")
CAPTIONS = "; or captions alone: the lines of a file .txt (default: common captions)"
HEADINGS = {
    "teacher": "teacher and student", "sampling": "how it is optimised", "lora": "the LoRA", "data": "the data",
    "watching": "watching and saving",
    "machine": "memory and speed",
}
COMMANDS = {
    LORA: ("a small addition to a model, which learns a kind of sound from a few clips",
           "Train a LoRA, arXiv:2106.09685. OUT/pytorch_lora_weights.safetensors is what ldm2 (--lora OUT), diffusers "
           "and peft read."),
    DISTILL: ("a student that needs 4 model evaluations and no guidance",
              "Distill the model by its own guided runs. OUT/pytorch_lora_weights.safetensors is used as --preset "
              "instant --lora OUT; with --full, OUT is a checkpoint."),
    FINETUNE: ("all weights of a model's UNet, on data of your own",
               "Train the UNet. OUT is a checkpoint in the hub's layout, which ldm2 (--model OUT) and diffusers read."),
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the parser's."""
    train = commands.add_parser("train", help="teach a model sounds of your own",
                                description="Teach a model sounds of your own.")
    kinds = train.add_subparsers(dest="kind", metavar="WHAT", required=True, parser_class=options.Parser)
    for task, (help, description) in COMMANDS.items():
        command = kinds.add_parser(task, help=help, description=description, epilog=f"For example: ldm2 train {task} "
                                   "sounds -o mine --model audioldm2 --dry-run. Run the same command again to go on "
                                   "where it was stopped.")
        alone = task == DISTILL
        command.add_argument("data", metavar="DATA", nargs="?" if alone else None,
                             help=SOUNDS + (CAPTIONS if alone else ""))
        command.add_argument("-o", "--output", metavar="OUT", required=True, help="folder for the result, and in "
                             "training/ for all that is needed to go on")
        command.add_argument("--overwrite", action="store_true", help="begin anew where OUT holds a training already")
        command.add_argument("--dry-run", action="store_true", help="measure a step, print memory and time of it all, "
                             "and write nothing")
        command.add_argument("-q", "--quiet", action="store_true", help="no progress")
        add_training(command, task)
        options.add_checkpoint_options(command.add_argument_group("the model"))
        command.set_defaults(run=run)


def add_training(command: argparse.ArgumentParser, task: str) -> None:
    """Every option of a kind of training, under the heading of its group."""
    known = options_of(Training, task)
    for group, heading in HEADINGS.items():
        names = [name for name, each in known.items() if each.group == group]
        section = command.add_argument_group(heading) if names else command
        for name in names:
            options.add_option(section, Training, name, known[name], task)


def run(args: argparse.Namespace) -> int:
    """Train, or measure. Returns the exit code."""
    from ldm2.training import distill, tuning
    from ldm2.training.loop import Stopped

    asked = Training.create(args.kind, **options.given(args, Training, args.kind))
    load = {name: getattr(args, name) for name in
            ("device", "reference", "revision", "variant", "local_files_only", "tokenizers")}
    job = tuning.Job(args.data, args.output, asked, args.model, load, overwrite=args.overwrite,
                     progress=not args.quiet)
    course = distill if args.kind == DISTILL else tuning
    if args.dry_run:
        print(course.estimate(job))
        return 0
    try:
        print(course.train(job))
    except Stopped as stop:
        say(f"{stop}; all is saved, run the same command again to go on")
        return 128 + stop.number
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on from the last save")
        return 130
    return 0
