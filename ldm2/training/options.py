"""One description of a training: every option once, as `ldm2.settings` has those of a request. Imports no torch.

The command line is made from the fields below, and OUT/training/job.json holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

from ldm2.options import (
    Kind,
    check_options,
    check_text,
    choice,
    flag,
    integer,
    number,
    option,
    options_of,
    refuse_unknown,
)
from ldm2.settings import MAX_SECONDS

LORA, FINETUNE, DISTILL = TASKS = ("lora", "finetune", "distill")
FROM_SOUNDS = (LORA, FINETUNE)
LAYERS_OF_UNET = ("attention", "feed_forward", "convolution", "time")
PROJECTION = "projection"                  # of CLAP and T5 (or phonemes) to the inputs of GPT-2
LAYERS = (*LAYERS_OF_UNET, PROJECTION)
TEACHER_STEPS = 24                         # at least; a guided run in fewer of them is another sound
DTYPES = ("auto", "float32", "bfloat16")


def layer_names() -> Kind:
    """Names of LAYERS, one or several with commas between them. Kept as a tuple, in the order of LAYERS."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        several = (value,) if isinstance(value, str) else value
        if not isinstance(several, Sequence) or not several or not all(each in LAYERS for each in several):
            raise ValueError(f"{name} must be some of {', '.join(LAYERS)}, got {value!r}")
        return tuple(each for each in LAYERS if each in several)

    return Kind(check, lambda text: [part.strip() for part in text.split(",")],
                {"type": "array", "items": {"enum": list(LAYERS)}, "maxItems": len(LAYERS)})


def several_texts() -> Kind:
    """Texts, kept as a tuple; on a command line one each time."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        several = (value,) if isinstance(value, str) else value
        if not isinstance(several, Sequence):
            raise ValueError(f"{name} must be a list of strings, got {value!r}")
        return tuple(check_text(name, text) for text in several)

    return Kind(check, str, {"type": "array", "items": {"type": "string"}})


def path_text() -> Kind:
    """The path of a folder."""
    return Kind(lambda name, value: check_text(name, str(value)), str, {"type": "string"})


@dataclass(frozen=True)
class Training:
    """How a model is trained. None stands for the default of the task: see `resolved`.

    Raises ValueError naming option, value and rule.
    """

    task: str = option(choice(TASKS), "what to train", group="task")
    _: KW_ONLY
    steps: int | None = option(integer(1), "optimiser steps", default=1000,
                              per_task={FINETUNE: 10_000, DISTILL: 2000})
    batch_size: int | None = option(
        integer(1), "clips that go through the model at once, on each device", default=4,
        per_task={DISTILL: 16}, metavar="N")
    accumulate: int | None = option(
        integer(1), "batches whose gradients make one step: as a batch N times as large, in the memory of one",
        default=1, metavar="N")
    rate: float | None = option(
        number(above=0, maximum=1), "peak learning rate of AdamW (arXiv:1711.05101)", default=1e-4,
        per_task={FINETUNE: 2e-5, DISTILL: 2e-4})
    warmup: int | None = option(integer(1), "steps until the rate has its peak", default=100, metavar="STEPS")
    decay_from: float | None = option(
        number(0, 1), "share of the steps after which the rate falls to zero, linearly; 1: never", default=0.5,
        metavar="SHARE")
    weight_decay: float | None = option(number(0), "AdamW's weight decay", default=0.01)
    clip: float | None = option(number(above=0), "largest norm of the gradient", default=1.0, metavar="NORM")
    average: float | None = option(
        number(0, 0.999999), "decay of the moving average of the weights, which is what is kept", default=0.9999,
        per_task={DISTILL: 0.99}, tasks=(FINETUNE, DISTILL), metavar="DECAY")
    snr_gamma: float | None = option(
        number(above=0), "signal-to-noise ratio from which on time steps count less (arXiv:2303.09556)", default=5.0,
        tasks=FROM_SOUNDS, metavar="GAMMA")
    drop: float | None = option(
        number(0, 1), "share of the clips that are trained without their caption, for guidance (arXiv:2207.12598)",
        default=0.1, tasks=FROM_SOUNDS, metavar="SHARE")
    seed: int | None = option(integer(0), "number that fixes all that is random", default=0)

    rank: int | None = option(integer(1, 4096), "rank of the LoRA (arXiv:2106.09685)", group="lora", default=16,
                              tasks=(LORA, DISTILL))
    alpha: float | None = option(
        number(above=0), "the LoRA's product counts alpha / rank (default: the rank)", group="lora",
        tasks=(LORA, DISTILL))
    layers: Sequence[str] | None = option(
        layer_names(), f"which layers get one: {', '.join(LAYERS_OF_UNET)} of the UNet, {PROJECTION} before GPT-2; "
        "with commas between them", group="lora",
        default=("attention",), per_task={DISTILL: LAYERS_OF_UNET}, tasks=(LORA, DISTILL), metavar="NAMES")
    full: bool = option(flag(), "train the whole UNet instead; the result is a checkpoint", group="lora", value=False,
                        tasks=(DISTILL,))

    evaluations: int | None = option(
        integer(1, 50), "model evaluations that the student takes for a sound", group="teacher", default=4,
        tasks=(DISTILL,), metavar="N")
    teacher_steps: int | None = option(
        integer(1, 1000), "steps of the teacher for a sound (dpmpp-2m, trailing), a multiple of evaluations (default: "
        "24, or the next multiple)", group="teacher", tasks=(DISTILL,), metavar="N")
    guidance_scale: float | None = option(
        number(), "of the teacher, which the student has without guidance (default: the model's own)", group="teacher",
        tasks=(DISTILL,), metavar="SCALE")
    runs: int | None = option(
        integer(1), "sounds that the teacher makes for the student to learn from", group="teacher", default=2000,
        tasks=(DISTILL,), metavar="N")
    together: int | None = option(
        integer(1), "sounds that the teacher makes at once: more of them keep a large GPU busy", group="teacher",
        default=8, tasks=(DISTILL,), metavar="N")
    own_states: float | None = option(
        number(0, 1), "share of the rows, beyond a run's first step, that begin where the student itself arrives in "
        "place of the teacher, who goes on from there (arXiv:1011.0686)", group="teacher", default=0.0,
        tasks=(DISTILL,), metavar="SHARE")

    seconds: float | None = option(
        number(above=0, maximum=MAX_SECONDS, unit="seconds"), "length of the crops (default: what the model was "
        "trained on); shorter clips are continued with silence", group="data")
    sounds: str | None = option(
        path_text(), "folder that relative paths in a table start from (default: the table's own)", group="data",
        metavar="FOLDER")
    strict: bool = option(flag(), "stop at a clip that cannot be read or has no caption, instead of leaving it out",
                          value=False, group="data")
    cache: str | None = option(
        path_text(), "folder for what is computed of clips and captions (default: in OUT)", group="data",
        metavar="FOLDER")

    keep: str | None = option(
        path_text(), "file with a prompt a line that the model should go on answering as before: it makes a sound of "
        "each first, and learns to predict of them, and without a caption, what it did (arXiv:1606.09282)",
        group="data", tasks=FROM_SOUNDS, metavar="FILE")
    keep_share: float | None = option(
        number(0, 0.99), "share of the rows that come from these sounds", group="data", default=0.5,
        tasks=FROM_SOUNDS, metavar="SHARE")

    held_out: float | None = option(
        number(0, 0.9), "share of the clips that is kept aside to measure the loss on", group="watching", default=0.0,
        metavar="SHARE")
    patience: int | None = option(
        integer(1), "stop when the held-out loss was not smaller than before in N measurements, and keep the weights "
        "that had the smallest", group="watching", metavar="N")
    preview: Sequence[str] = option(
        several_texts(), "make a sound of this prompt now and then; may be repeated", value=(), group="watching",
        metavar="PROMPT")
    every: int | None = option(integer(1), "steps between previews, and between measurements of the held-out loss",
                               group="watching", default=100, metavar="STEPS")
    save_minutes: float | None = option(
        number(0), "minutes between saves, from which a training that was stopped goes on", group="watching",
        default=5.0, metavar="MINUTES")

    dtype: str | None = option(
        choice(DTYPES), f"of the computation: {', '.join(DTYPES)}; what is trained stays float32 (auto: bfloat16 on "
        "GPUs that have it, else float32)", group="machine", default="auto", metavar="NAME")
    checkpointing: bool = option(
        flag(), "keep few activations and compute the others again (arXiv:1604.06174): a third slower, in much less "
        "memory", value=False, group="machine")

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", choice(TASKS).check("task", self.task))
        check_options(self)
        known = options_of(type(self))
        for name, each in known.items():
            if not each.applies_to(self.task) and getattr(self, name) not in (None, False, ()):
                raise ValueError(f"{self.task} takes no {name}, got {getattr(self, name)!r}")

    @classmethod
    def create(cls, task: str, /, **options: Any) -> Self:
        """The options of a task by their names. Raises UnknownOption for a name that is none."""
        refuse_unknown(f"train {task}", options, options_of(cls, task))
        return cls(task, **options)

    def resolved(self) -> Self:
        """These options with the defaults of the task filled in. Raises ValueError for values that do not go together.
        """
        known = options_of(type(self), self.task)
        filled = {name: each.default_for(self.task) for name, each in known.items() if getattr(self, name) is None}
        done = replace(self, **{name: value for name, value in filled.items() if value is not None})
        if done.low_rank and done.alpha is None:
            done = replace(done, alpha=float(done.rank or 1))
        if done.evaluations is not None:
            done = done._with_teacher(done.evaluations)
        if done.task == DISTILL and done.trains_projection:
            raise ValueError(f"layers of {DISTILL} are of the UNet ({', '.join(LAYERS_OF_UNET)}), got {PROJECTION!r}")
        if done.patience is not None and not done.held_out:
            raise ValueError(f"patience {done.patience} needs held_out, the share of clips to measure the loss on")
        return done

    def _with_teacher(self, evaluations: int) -> Self:
        """With the steps of a teacher that fit a student's evaluations. Raises ValueError."""
        steps = -(-TEACHER_STEPS // evaluations) * evaluations if self.teacher_steps is None else self.teacher_steps
        if steps % evaluations:
            raise ValueError(f"teacher_steps must be a multiple of evaluations ({evaluations}), got {steps}")
        return replace(self, teacher_steps=steps)

    @property
    def low_rank(self) -> bool:
        """Whether a LoRA is trained, and not all weights."""
        return self.task == LORA or (self.task == DISTILL and not self.full)

    @property
    def trains_projection(self) -> bool:
        """Whether the projection before GPT-2 is trained too."""
        return PROJECTION in (self.layers or ())

    @property
    def asks_the_untrained(self) -> bool:
        """Whether the training needs the predictions of the model as it was before."""
        return self.keep is not None or bool(self.own_states)

    def plain(self) -> dict[str, Any]:
        """The options of the task as JSON has them."""
        values = {name: getattr(self, name) for name in options_of(type(self), self.task)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# What may be another when a training goes on: it changes nothing of the weights.
FREE = ("preview", "save_minutes", "cache", "strict")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first option in which two trainings differ, in words; None if there is none."""
    for name in [*now, *before]:
        if name not in FREE and before.get(name) != now.get(name):
            return f"{name} {before.get(name)!r} instead of {now.get(name)!r}"
    return None
