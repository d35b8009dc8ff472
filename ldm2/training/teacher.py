"""What a student learns from: sounds that the teacher makes, with the states that it passes on the way.

A run goes from noise to a sound along the probability-flow ODE (arXiv:2011.13456, section 4.3), in many guided steps of
DPM-Solver++. It is kept at the timesteps at which the student will be evaluated. Runs are made once and kept in files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.noise import SeededNoise
from ldm2.samplers import Step
from ldm2.settings import Sampling
from ldm2.stages import Init, Stages
from ldm2.training import captions, data
from ldm2.training.data import Clip, Data
from ldm2.training.encoding import (
    Report,
    Store,
    Text,
    basis_of,
    encode_sides,
    encode_sound,
    join_rows,
    key_of,
)
from ldm2.training.loop import generator_for
from ldm2.training.options import Training

_SEEDS = 1 << 40                           # of the runs: far from those that people choose


@dataclass(frozen=True)
class Subject:
    """What a run is about: a caption, what is said in it, and the key of a sound's latents that it begins from."""

    caption: str
    spoken: str | None = None
    latents: str | None = None


@dataclass(frozen=True)
class Group:
    """Runs that were made together. key: of their states in the store. first: the student's step that they begin with.

    texts: the keys of their conditionings, and `nothing` those of the unconditional side.
    """

    key: str
    first: int
    texts: tuple[str, ...]
    nothing: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    """All groups, and one line for each sound that was left out."""

    groups: tuple[Group, ...]
    skipped: tuple[str, ...] = ()


def scale_of(pipe: Stages, options: Training) -> float:
    """The guidance scale of a teacher."""
    return Sampling(guidance_scale=options.guidance_scale).resolved(pipe.defaults).guidance_scale or 1.0


@dataclass
class Teacher:
    """A model that makes runs for a student, by the options of its training. model: a digest of its files."""

    pipe: Stages
    model: str
    options: Training
    frames: int
    store: Store

    def __post_init__(self) -> None:
        self.scale = scale_of(self.pipe, self.options)
        self.student, self.steps = self.options.evaluations or 1, self.options.teacher_steps or 1
        self._basis = basis_of(self.pipe, self.model)

    def bytes_needed(self) -> int:
        """Disk for the states of all runs."""
        shape = self.pipe.latent_shape_for_frames(self.frames * self.pipe.vae.config.downsampling)
        return 2 * math.prod(shape) * (self.student + 1) * (self.options.runs or 1)

    def prepare(self, place: str | Path | None, report: Report) -> Runs:
        """Make all runs that the store does not hold yet, about the captions and sounds of a place.

        place: a file of captions .txt, sounds with captions as `data.read` takes them, or None for common captions.
        Raises ValueError or OSError, one line.
        """
        found = self._read(place)
        subjects, skipped = self._subjects(found, report)
        chosen = self._chosen(subjects)
        texts = encode_sides(self.pipe, dict.fromkeys((each.caption, each.spoken) for each in chosen), self._basis,
                             self.store, report)
        together = self.options.together or 1
        parts = [chosen[i : i + together] for i in range(0, len(chosen), together)]
        groups = []
        with self.pipe.stages["unet"]:
            for number, part in enumerate(parts):
                report("the teacher makes sounds", number, len(parts))
                groups.append(self._group(number, part, texts))
        return Runs(tuple(groups), (*found.skipped, *skipped))

    def _read(self, place: str | Path | None) -> Data:
        """Clips; those without a path are captions alone."""
        if place is None or str(place).endswith(".txt"):
            lines = self._common() if place is None else dict.fromkeys(data.texts(place, "caption"))
            return Data([Clip(Path(), (line,)) for line in lines])
        return data.read(place, self.options.sounds, self.options.strict)

    def _common(self) -> list[str]:
        if self.pipe.origin.get("model") == "tiny":
            from ldm2.training.tiny.sounds import all_captions

            return all_captions()
        return captions.common()

    def _subjects(self, found: Data, report: Report) -> tuple[list[Subject], list[str]]:
        """Every caption, with the latents of its sound where there is one; and what was left out."""
        subjects: list[Subject] = []
        skipped: list[str] = []
        is_speech_model = self.pipe.text.is_speech_model
        with self.pipe.stages["vae"]:
            for done, clip in enumerate(found.clips):
                report("encoding sounds", done, len(found.clips))
                latents = None
                if clip.path != Path():
                    latents = encode_sound(self.pipe, clip.path, self.frames, self._basis, self.store,
                                           None if self.options.strict else skipped)
                    if latents is None:
                        continue
                subjects += [Subject(caption, clip.transcription or caption if is_speech_model else None, latents)
                             for caption in clip.captions]
        if not subjects:
            raise ValueError(f"no sound could be read: {skipped[0]}")
        return subjects, skipped

    def _chosen(self, subjects: Sequence[Subject]) -> list[Subject]:
        """A subject for each run: all of them in random order, again and again."""
        chosen: list[Subject] = []
        while len(chosen) < (self.options.runs or 1):
            generator = generator_for((self.options.seed or 0) + 3, len(chosen))
            chosen += [subjects[i] for i in torch.randperm(len(subjects), generator=generator)]
        return chosen[: self.options.runs]

    def _group(self, number: int, subjects: Sequence[Subject], texts: Mapping[Text, tuple[str, str]]) -> Group:
        """Runs that begin at noise, or, where there are sounds, in turn at all of the student's steps."""
        first = number % self.student if all(subject.latents for subject in subjects) else 0
        seed = _SEEDS + ((self.options.seed or 0) << 24) + number * (self.options.together or 1)
        sides = [texts[subject.caption, subject.spoken] for subject in subjects]
        sounds = [subject.latents for subject in subjects] if first else None
        key = key_of("runs", *self._basis, sides, seed, first, sounds, self.frames, self.student, self.steps,
                     self.scale)
        if not self.store.has(key):
            rows = [join_rows(self.store, [side[i] for side in sides]) for i in (0, 1)]
            states = self._run(rows, seed, first, [self._latents(subject) for subject in subjects] if first else None)
            self.store.put(key, {"states": states})
        return Group(key, first, tuple(side[0] for side in sides), tuple(side[1] for side in sides))

    def _latents(self, subject: Subject) -> Tensor:
        """The first `frames` of a sound's latents, scaled."""
        mean = self.store.get(subject.latents or "")["mean"][:, : self.frames]
        return mean * self.pipe.vae.config.scaling_factor

    def _run(self, sides: Sequence[Conditioning], seed: int, first: int, sounds: Sequence[Tensor] | None) -> Tensor:
        """The states of runs (rows, evaluations - first + 1, C, T, F), float16, the last of which are the sounds."""
        stride, states = self.steps // self.student, []

        def watch(step: Step) -> Tensor:
            if step.index % stride == 0:
                states.append(step.x_t.cpu())
            return step.x_t

        noise = SeededNoise(range(seed, seed + sides[0].batch_size))
        shape = self.pipe.latent_shape_for_frames(self.frames * self.pipe.vae.config.downsampling)
        x_0 = None if sounds is None else torch.stack(list(sounds)).to(self.pipe.device)
        x_T = noise.draw(*shape).to(self.pipe.device)
        sampling: Any = {"sampler": "dpmpp-2m", "steps": self.steps, "spacing": "trailing"}
        end = self.pipe.denoise(sides[0], sides[1] if self.scale > 1 else None, x_T,
                                Sampling(guidance_scale=self.scale, **sampling),
                                init=Init(x_0, first * stride, watch))
        return torch.stack([*states, end.cpu()], dim=1).half()
