"""A student that needs few model evaluations and no guidance: `ldm2 train distill`.

A teacher's run is cut at the timesteps at which the student is evaluated, and the student learns to go from one cut to
the next in one DDIM step: the result that progressive distillation (arXiv:2202.00512) works towards in many rounds,
taken from the teacher's own path at once. Guidance is in the path (arXiv:2210.03142), so the student has it without
computing it. It is sampled by ddim with trailing timesteps, and equal seeds give nearly the teacher's sounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.device import choose_device, choose_dtype
from ldm2.runtime.memory import gigabytes, peak_bytes
from ldm2.runtime.progress import shown
from ldm2.samplers import timesteps
from ldm2.schedules import Schedule
from ldm2.training import tuning
from ldm2.training.encoding import Store, conditioning, model_digest
from ldm2.training.folder import Folder
from ldm2.training.loop import generator_for, processes, rank
from ldm2.training.options import Training
from ldm2.training.teacher import AT_ONCE, Group, Teacher
from ldm2.training.tuning import Job, Learner

_KEPT = 64                                 # files of runs that stay in memory


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
    """Rows of a training step: states x (B, C, T, F) at the cuts `index` (B,), and those at the cuts after them."""

    x: Tensor
    x_next: Tensor
    index: Tensor
    conditioning: Conditioning


class Batches:
    """Draws the rows of each step from the segments of runs; what is drawn hangs on seed, step and row alone.

    rows: of a whole step, over all processes.
    """

    def __init__(self, groups: Sequence[Group], store: Store, *, rows: int, evaluations: int, seed: int):
        self.rows, self.seed = rows, seed
        self._places = [(group, row, cut) for group in groups for row in range(len(group.texts))
                        for cut in range(evaluations - group.first)]
        self._states = lru_cache(_KEPT)(lambda key: store.get(key)["states"])
        self._conditioning = lru_cache(512)(lambda key: conditioning(store, key))

    def __len__(self) -> int:
        return len(self._places)

    def take(self, step: int, first: int, count: int) -> Segments:
        """Rows first .. first + count - 1 of a training step."""
        x, x_next, index, conditions = [], [], [], []
        for row in range(first, first + count):
            epoch, place = divmod(step * self.rows + row, len(self))
            group, run, cut = self._places[self._order(epoch)[place]]
            states = self._states(group.key)[run].float()
            x.append(states[cut])
            x_next.append(states[cut + 1])
            index.append(group.first + cut)
            conditions.append(self._conditioning(group.texts[run]))
        return Segments(torch.stack(x), torch.stack(x_next), torch.tensor(index), Conditioning.join(conditions))

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

    def example(self, latents: Tensor, conditioning: Conditioning) -> Segments:
        """A batch to measure with."""
        index = torch.arange(len(latents)) % len(self.cuts.timesteps)
        return Segments(latents, latents, index, conditioning)

    def error(self, batch: Segments) -> Tensor:
        """The mean squared error of the states after the step (B,): at its noise level, each counts about alike."""
        device, levels = self.pipe.device, torch.tensor(self.cuts.alphas_cumprod)
        x, index = batch.x.to(device), batch.index
        t = torch.tensor(self.cuts.timesteps)[index].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.unet(x, t, batch.conditioning.to(device))
        a, a_next = (levels[i].to(device) for i in (index, index + 1))
        reached = ddim_step(self.schedule.prediction_type, x, predicted.float(), a, a_next)
        return ((reached - batch.x_next.to(device)) ** 2).mean(dim=(1, 2, 3))


def ddim_step(prediction_type: str, x: Tensor, prediction: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """x_t (B, C, T, F) -> the state at a_next, arXiv:2010.02502 equation 12 with sigma = 0. a, a_next: (B,)."""
    a, a_next = (each[:, None, None, None] for each in (a, a_next))
    if prediction_type == "epsilon":
        x_0, eps = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
    elif prediction_type == "sample":
        x_0, eps = prediction, (x - a.sqrt() * prediction) / (1 - a).sqrt()
    else:                                                  # v: arXiv:2202.00512, appendix D
        x_0, eps = a.sqrt() * x - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x
    return a_next.sqrt() * x_0 + (1 - a_next).sqrt() * eps


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
        kept, held_out = (Batches(part, store, rows=rows, **common) for part in parts)
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
    evaluation = _evaluation(teacher, frames)
    branches = (options.teacher_steps or 1) * (1 if options.guidance_scale is not None and options.guidance_scale <= 1
                                               else 2)
    making = evaluation * branches * (options.runs or 1)
    student = _student(job, options, device)
    trained, each, needed = tuning.measured(student, frames)
    learning = each * (options.steps or 1)
    times = [str(timedelta(seconds=round(seconds))) for seconds in (making, learning, making + learning)]
    return (f"{trained.numbers:,} numbers are trained, {str(student.dtype)[6:]} on {device}\n"
            f"memory: {gigabytes(peak_bytes(device))} at the peak; disk: {needed / 1e9:.2f} GB and the teacher's runs\n"
            f"teacher: {evaluation:.3f} s an evaluation, {times[0]} for {options.runs} runs\n"
            f"student: {each:.2f} s a step, {times[1]} for {options.steps} steps\ntime: {times[2]} in all")


def _evaluation(pipe: AudioLDM2, frames: int) -> float:
    """The seconds of one evaluation of the teacher for one row, in a batch of AT_ONCE."""
    x, conditions = tuning.noise_for(pipe, frames, AT_ONCE)
    with pipe.stages["unet"], torch.inference_mode():
        times = []
        for _ in range(2):
            began = perf_counter()
            pipe.unet(x.to(pipe.device, pipe.dtype), 500.0, conditions.to(pipe.device, pipe.dtype)).cpu()
            times.append(perf_counter() - began)
    return min(times) / AT_ONCE
