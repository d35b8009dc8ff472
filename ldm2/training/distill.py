"""A student that needs few model evaluations and no guidance: `ldm2 train distill`.

A teacher's run is cut at the timesteps at which the student is evaluated, and the student learns to go from one cut to
the next in one DDIM step: the result that progressive distillation (arXiv:2202.00512) works towards in many rounds,
taken from the teacher's own path at once. Guidance is in the path (arXiv:2210.03142), so the student has it without
computing it. It is sampled by ddim with trailing timesteps, and equal seeds give nearly the teacher's sounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.guidance import guide
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.device import choose_device, choose_dtype, dtype_name
from ldm2.runtime.memory import gigabytes, peak_bytes
from ldm2.runtime.progress import shown
from ldm2.samplers import timesteps
from ldm2.schedules import Schedule
from ldm2.training import tuning
from ldm2.training.encoding import Store, conditioning, model_digest
from ldm2.training.folder import Folder
from ldm2.training.loop import generator_for, processes, rank
from ldm2.training.options import Training
from ldm2.training.teacher import Group, Teacher, scale_of
from ldm2.training.tuning import Job, Learner

_KEPT = 1_000_000_000                      # bytes of runs that stay in memory


@dataclass(frozen=True)
class Cuts:
    """Where a run is cut: the timesteps of the evaluations, and alphas_cumprod (K + 1,) there and at the end."""

    timesteps: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]

    @classmethod
    def of(cls, schedule: Schedule, evaluations: int) -> Cuts:
        """Those of ddim with trailing timesteps, which steps down by equal strides."""
        spaced = schedule.with_spacing("trailing")
        times, stride = timesteps("ddim", spaced, evaluations), schedule.num_train_timesteps // evaluations
        levels = [spaced.alpha_cumprod(t) for t in times]
        return cls(times, (*levels, spaced.alpha_cumprod(times[-1] - stride)))


@dataclass(frozen=True)
class Segments:
    """Rows of a training step: states x (B, C, T, F) at the cuts `index` (B,), and those at the cuts after them.

    first: (B,) the cut at which x is instead, where that is less than `index`: the student has to go on from there to
    find its own state at `index`, and the teacher the state after it, with `unconditional` for guidance.
    """

    x: Tensor
    x_next: Tensor
    index: Tensor
    first: Tensor
    conditioning: Conditioning
    unconditional: Conditioning


class Batches:
    """Draws the rows of each step from the segments of runs; what is drawn hangs on seed, step and row alone.

    rows: of a whole step, over all processes. own_states: share of the rows that begin at a state of the student's own.
    """

    def __init__(
        self, groups: Sequence[Group], store: Store, *, rows: int, evaluations: int, seed: int, own_states: float = 0
    ):
        self.rows, self.seed, self.own_states = rows, seed, own_states
        self._places = [(group, row, cut) for group in groups for row in range(len(group.texts))
                        for cut in range(evaluations - group.first)]
        size = store.get(groups[0].key)["states"].nbytes if groups else 1
        self._states = lru_cache(max(8, _KEPT // size))(lambda key: store.get(key)["states"])
        self._conditioning = lru_cache(10_000)(lambda key: conditioning(store, key))

    def __len__(self) -> int:
        return len(self._places)

    def take(self, step: int, first: int, count: int) -> Segments:
        """Rows first .. first + count - 1 of a training step."""
        own = torch.rand(self.rows, generator=generator_for(self.seed + 4, step)) < self.own_states
        x, x_next, index, begin, sides = [], [], [], [], []
        for row in range(first, first + count):
            epoch, place = divmod(step * self.rows + row, len(self))
            group, run, cut = self._places[self._order(epoch)[place]]
            states = self._states(group.key)[run]
            begin.append(group.first + (0 if own[row] else cut))
            x.append(states[0 if own[row] else cut])
            x_next.append(states[cut + 1])
            index.append(group.first + cut)
            sides.append([self._conditioning(keys[run]) for keys in (group.texts, group.nothing)])
        return Segments(torch.stack(x).float(), torch.stack(x_next).float(), torch.tensor(index), torch.tensor(begin),
                        *(Conditioning.join(side) for side in zip(*sides)))

    @lru_cache(2)                                          # noqa: B019
    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self), generator=generator_for(self.seed, epoch)).tolist()


@dataclass
class Student(Learner):
    """The model that learns from runs: its error is how far one DDIM step ends from the teacher's state there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.options.evaluations or 1
        self.cuts = Cuts.of(self.schedule, count)
        self.settings = sampling_of(count)
        self.ode = Ode(self.schedule, self.options.teacher_steps or count)
        self.scale = scale_of(self.pipe, self.options)

    def example(self, latents: Tensor, conditioning: Conditioning) -> Segments:
        """A batch to measure with."""
        rows = torch.arange(len(latents))
        index = rows % len(self.cuts.timesteps)
        first = torch.where(rows < (self.options.own_states or 0) * len(rows), 0, index)
        return Segments(latents, latents, index, first, conditioning, conditioning)

    def error(self, batch: Segments) -> Tensor:
        """The mean squared error of the states after the step (B,): at its noise level, each counts about alike."""
        x, x_next = batch.x.to(self.pipe.device), batch.x_next.to(self.pipe.device)
        if rows := (batch.first < batch.index).nonzero()[:, 0].tolist():
            x, x_next = x.clone(), x_next.clone()
            x[rows], x_next[rows] = self._own(x[rows], batch.first[rows], batch.index[rows],
                                              batch.conditioning.select(rows), batch.unconditional.select(rows))
        return ((self._step(x, batch.index, batch.conditioning) - x_next) ** 2).mean(dim=(1, 2, 3))

    def _step(self, x: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        """The states at the cuts after those of `index`."""
        predicted = self.predict(self.unet, x, torch.tensor(self.cuts.timesteps)[index], conditioning)
        a, a_next = (torch.tensor(self.cuts.alphas_cumprod)[i].to(x.device) for i in (index, index + 1))
        return ddim_step(self.schedule.prediction_type, x, predicted, a, a_next)

    @torch.no_grad()
    def _own(self, x: Tensor, first: Tensor, index: Tensor, conditioning: Conditioning,
             unconditional: Conditioning) -> tuple[Tensor, Tensor]:
        """The states that the student reaches at `index` from x at `first`, and where the teacher goes from there."""
        for cut in range(int(first.min()), int(index.max())):
            if rows := ((first <= cut) & (cut < index)).nonzero()[:, 0].tolist():
                x[rows] = self._step(x[rows], torch.full((len(rows),), cut), conditioning.select(rows))
        sides = conditioning if self.scale <= 1 else Conditioning.join([unconditional, conditioning])
        count = self.ode.steps // len(self.cuts.timesteps)
        with self.trained.untrained() as unet:

            def predict(x: Tensor, t: Tensor) -> Tensor:
                if self.scale <= 1:
                    return self.predict(unet, x, t, sides)
                return guide(self.predict(unet, torch.cat([x, x]), torch.cat([t, t]), sides), self.scale)

            return x, self.ode.follow(predict, x, index * count, count)


class Ode:
    """Steps of DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) with trailing timesteps, for rows at different ones."""

    def __init__(self, schedule: Schedule, steps: int):
        spaced = schedule.with_spacing("trailing")
        times = timesteps("dpmpp-2m", spaced, steps)
        self.steps, self.kind, self.timesteps = steps, schedule.prediction_type, torch.tensor(times)
        self.alphas_cumprod = torch.tensor([*(spaced.alpha_cumprod(t) for t in times), 1.0])

    def follow(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, places: Tensor, count: int) -> Tensor:
        """States x (B, C, T, F) before the steps `places` (B,) -> those `count` steps later.

        predict: predict(x, t (B,)) -> what the schedule's prediction_type names.
        """
        before: tuple[Tensor, Tensor] | None = None        # x_0, and the last step in half the logarithm of the SNR
        for place in (places + number for number in range(count)):
            a, a_next = (self.alphas_cumprod[i].to(x.device) for i in (place, place + 1))
            x_0, _ = clean(self.kind, x, predict(x, self.timesteps[place]), a)
            h, last = 0.5 * (torch.logit(a_next) - torch.logit(a)), a_next == 1
            slope = torch.zeros_like(x_0)
            if before is not None:                         # the last step has no end, and goes straight to x_0
                slope = _rows(torch.where(last, 0.0, 0.5 * h / before[1])) * (x_0 - before[0])
            shrunk = _rows(torch.where(last, 0.0, (-h).exp()))
            x = _rows(((1 - a_next) / (1 - a)).sqrt()) * x + _rows(a_next.sqrt()) * (1 - shrunk) * (x_0 + slope)
            before = x_0, h
        return x


def ddim_step(prediction_type: str, x: Tensor, prediction: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """x_t (B, C, T, F) -> the state at a_next, arXiv:2010.02502 equation 12 with sigma = 0. a, a_next: (B,)."""
    x_0, eps = clean(prediction_type, x, prediction, a)
    return _rows(a_next.sqrt()) * x_0 + _rows((1 - a_next).sqrt()) * eps


def clean(prediction_type: str, x: Tensor, prediction: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """What a prediction for x_t (B, C, T, F) says of x_0 and of the noise. a: (B,) alphas_cumprod."""
    a = _rows(a)
    if prediction_type == "epsilon":
        return (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
    if prediction_type == "sample":
        return prediction, (x - a.sqrt() * prediction) / (1 - a).sqrt()
    # v: arXiv:2202.00512, appendix D
    return a.sqrt() * x - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x


def _rows(values: Tensor) -> Tensor:
    """(B,) as factors of rows (B, C, T, F)."""
    return values[:, None, None, None]


def sampling_of(evaluations: int) -> dict[str, Any]:
    """How a student is sampled, by the names of a request's options."""
    return {"steps": evaluations, "sampler": "ddim", "spacing": "trailing", "guidance_scale": 1.0}


def train(job: Job) -> str:
    """Distill, or go on with it. Returns what was made, in words.

    Raises ValueError or OSError, one line, for input that makes no sense; Stopped after Ctrl-C, when all is saved.
    """
    options = job.options.resolved()
    asked = {"options": options.plain(), "model": model_digest(tuning.model_path(job))}
    folder = Folder(job.out)
    store = tuning.store_of(folder, options)
    with tuning.together(job) as device:
        if rank() == 0:
            folder.check(asked, job.overwrite)
        pipe = tuning.load_model(job, device, choose_dtype("auto", device))
        teacher = Teacher(pipe, str(asked["model"]), options, tuning.frames_of(pipe, options), store)
        if rank() == 0:
            folder.begin(asked, job.overwrite)
            if options.cache is None:
                folder.check_space(teacher.bytes_needed())
        with shown(job.progress and rank() == 0) as report:
            runs = tuning.by_the_first(lambda: teacher.prepare(job.data, report))
        tuning.tell_skipped(runs.skipped)
        if rank() == 0:
            folder.settle(asked | {"data": [group.key for group in runs.groups]})
        aside = max(1, round(options.held_out * len(runs.groups))) if options.held_out else 0
        parts = runs.groups[aside:], runs.groups[:aside]
        if not parts[0]:
            raise ValueError(f"held_out {options.held_out} leaves no runs to learn from: ask for more runs")
        rows = (options.batch_size or 1) * (options.accumulate or 1) * processes()
        common: dict[str, Any] = {"evaluations": options.evaluations or 1, "seed": options.seed or 0}
        kept = Batches(parts[0], store, rows=rows, own_states=options.own_states or 0, **common)
        held_out = Batches(parts[1], store, rows=rows, **common)
        held_out.rows = len(held_out)
        return tuning.run_training(job, folder, _student(job, options, device), kept, held_out)


def _student(job: Job, options: Training, device: torch.device) -> Student:
    """The model anew, with frozen weights in the dtype of the computation, and trained ones in float32."""
    dtype = tuning.dtype_of(options, device)
    pipe = tuning.load_model(job, device, dtype if options.low_rank else torch.float32)
    return Student(pipe, options, dtype)


def estimate(job: Job) -> str:
    """Memory and time of a distillation, from a measured step of the teacher and of the student. Nothing is written."""
    options = job.options.resolved()
    Folder(job.out).check({"options": options.plain()}, job.overwrite)
    device = choose_device(job.load.get("device", "auto"))
    teacher = tuning.load_model(job, device, choose_dtype("auto", device))
    frames = tuning.frames_of(teacher, options)
    evaluation = _evaluation(teacher, frames, options.together or 1)
    branches = (options.teacher_steps or 1) * (1 if options.guidance_scale is not None and options.guidance_scale <= 1
                                               else 2)
    making = evaluation * branches * (options.runs or 1)
    student = _student(job, options, device)
    trained, each, needed = tuning.measured(student, frames)
    learning = each * (options.steps or 1)
    times = [str(timedelta(seconds=round(seconds))) for seconds in (making, learning, making + learning)]
    return (f"{trained.numbers:,} numbers are trained, {dtype_name(student.dtype)} on {device}\n"
            f"memory: {gigabytes(peak_bytes(device))} at the peak; disk: {needed / 1e9:.2f} GB and the teacher's runs\n"
            f"teacher: {evaluation:.3f} s an evaluation, {times[0]} for {options.runs} runs\n"
            f"student: {each:.2f} s a step, {times[1]} for {options.steps} steps\ntime: {times[2]} in all")


def _evaluation(pipe: AudioLDM2, frames: int, rows: int) -> float:
    """The seconds of one evaluation of the teacher for one row, in a batch."""
    x, conditions = tuning.noise_for(pipe, frames, rows)
    with pipe.stages["unet"], torch.inference_mode():
        times = []
        for _ in range(2):
            began = perf_counter()
            pipe.unet(x.to(pipe.device, pipe.dtype), 500.0, conditions.to(pipe.device, pipe.dtype)).cpu()
            times.append(perf_counter() - began)
    return min(times) / rows
