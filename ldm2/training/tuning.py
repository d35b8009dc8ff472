"""A model learns from sounds with captions: `ldm2 train lora` and `ldm2 train finetune`.

Clips and captions are encoded once (`encoding`), then only the UNet is in memory. OUT is described in `folder`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import ldm2
from ldm2.checkpoints import hub
from ldm2.checkpoints.known import DEFAULT_MODEL
from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.device import choose_device, dtype_name
from ldm2.runtime.memory import gigabytes, peak_bytes
from ldm2.runtime.progress import shown
from ldm2.training import data, outcome
from ldm2.training.batches import Batch, Batches, Rows, split
from ldm2.training.encoding import Store, encode, model_digest, own_sounds
from ldm2.training.folder import Folder
from ldm2.training.loop import HELD_OUT, Clock, Told, processes, rank
from ldm2.training.loop import train as run_loop
from ldm2.training.objective import add_noise, step_weights, target
from ldm2.training.options import Training
from ldm2.training.words import Words, check_projection, encode_words

log = logging.getLogger(__name__)

HELD_OUT_STEPS = 8                         # time steps at which each held-out clip is measured
TOKENS = 24                                # of a caption, where a step is measured without one
Made = TypeVar("Made")

MOST_NAMED = 20                            # of the clips that are left out
PATIENCE = timedelta(days=2)               # of processes with the first one, which encodes the clips


@dataclass(frozen=True)
class Job:
    """What is asked for.

    data, out: folder or table of clips (distill: or None); folder of the result. model: of `ldm2.load`; load: its
    other arguments.
    """

    data: str | Path | None
    out: str | Path
    options: Training
    model: str = DEFAULT_MODEL
    load: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    progress: bool = True


@dataclass
class Learner:
    """A pipeline whose UNet is trained, and how its error is measured. settings: of the sounds that it makes."""

    pipe: AudioLDM2
    options: Training
    dtype: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unet, self.schedule = self.pipe.unet, self.pipe.schedule
        self.words: Words | None = None                    # makes conditionings anew
        self.step = 0                                      # the number of the last step, from 1
        self._alphas = torch.as_tensor(self.schedule.alphas_cumprod, dtype=torch.float32)

    def prepare(self) -> outcome.Trained:
        """Make the UNet ready to be trained. Returns what of it is."""
        text = self.pipe.text if self.options.trains_projection else None
        self.trained = outcome.prepare(self.unet, self.options, text)
        return self.trained

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The time during which what is trained is in memory."""
        with self.pipe.stages["unet"], self.pipe.stages["text"] if self.options.trains_projection else nullcontext():
            yield

    def predict(self, unet: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction for x (B, C, T, F) at t (B,), float32, on the device of the model."""
        device = self.pipe.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return unet(x.to(device), t.to(device), conditioning.to(device, torch.float32)).float()

    def error(self, batch: Any) -> Tensor:
        """The weighted squared error of the rows (B,), arXiv:2303.09556 section 3.4."""
        kind = self.schedule.prediction_type
        a = self._alphas[batch.t]
        x_t, wanted = add_noise(batch.x_0, batch.eps, a), target(kind, batch.x_0, batch.eps, a)
        predicted = self.predict(self.unet, x_t, batch.t, self._conditioning(batch))
        wanted = wanted.to(predicted.device)
        if rows := batch.kept.nonzero()[:, 0].tolist():
            with self.trained.untrained() as unet:
                wanted[rows] = self.predict(unet, x_t[rows], batch.t[rows], batch.conditioning.select(rows))
        squared = ((predicted - wanted) ** 2).mean(dim=(1, 2, 3))
        return step_weights(kind, a, self.options.snr_gamma or 0).to(predicted.device) * squared

    def _conditioning(self, batch: Batch) -> Conditioning:
        """What the rows are conditioned on, as the model makes it now."""
        if self.words is None:
            return batch.conditioning
        device = self.pipe.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.words(batch.conditioning.to(device), batch.texts)

    def example(self, latents: Tensor, conditioning: Conditioning) -> Any:
        """A batch to measure with."""
        options, rows = self.options, torch.arange(len(latents))
        kept = rows < (options.keep_share or 0) * len(rows) if options.keep is not None else rows < 0
        return Batch(latents, latents, rows, conditioning, kept)

    def losses(self, batches: Rows, step: int) -> Iterator[Tensor]:
        """The parts of a step's loss that belong to this process, one after the other."""
        self.step = step + 1
        size, parts = self.options.batch_size or 1, self.options.accumulate or 1
        for part in range(parts):
            batch = batches.take(step, (part * processes() + rank()) * size, size)
            yield self.error(batch).mean() / parts

    def measure(self, batches: Rows) -> float:
        """The mean error of all rows of a step."""
        size = self.options.batch_size or 1
        firsts = range(0, batches.rows, size)
        errors = [self.error(batches.take(0, first, min(size, batches.rows - first))) for first in firsts]
        return float(torch.cat(errors).mean())


def train(job: Job) -> str:
    """Train, or go on with it. Returns what was made, in words.

    Raises ValueError or OSError, one line, for input that makes no sense; Stopped after Ctrl-C, when all is saved.
    """
    assert job.data is not None
    options = job.options.resolved()
    asked: dict[str, Any] = {"options": options.plain(), "model": model_digest(model_path(job))}
    folder = Folder(job.out)
    store = store_of(folder, options)
    with together(job) as device:
        if rank() == 0:
            folder.check(asked, job.overwrite)
        found = data.read(job.data, options.sounds, options.strict)
        prompts = [] if options.keep is None else data.texts(options.keep, "prompt")
        pipe = load_model(job, device, torch.float32)
        if options.trains_projection:
            check_projection(pipe)
        frames = frames_of(pipe, options)
        if rank() == 0:
            folder.begin(asked, job.overwrite)
        with shown(job.progress and rank() == 0) as report:
            examples = by_the_first(lambda: encode(pipe, asked["model"], found, frames, store, options.strict, report))
            own = by_the_first(lambda: own_sounds(pipe, asked["model"], prompts, frames, store, report))
            if options.trains_projection:
                texts = {text: None for text in [*found.texts, *((prompt, None) for prompt in prompts)]}
                by_the_first(lambda: encode_words(pipe, asked["model"], texts, store, report))
        kept, aside = split(examples, options.held_out or 0, options.seed or 0)
        tell_skipped(examples.skipped)
        _check_count(kept, options)
        if rank() == 0:
            folder.settle(asked | {"data": [example.latents for example in (*examples.all, *own)]})
        learner = _learner(job, options, pipe)
        if options.trains_projection:
            learner.words = Words(learner.pipe, store)
        common: dict[str, Any] = {"frames": frames, "scaling": pipe.vae.config.scaling_factor,
                                  "total": pipe.schedule.num_train_timesteps}
        rows = (options.batch_size or 1) * (options.accumulate or 1) * processes()
        batches = Batches(kept, examples.nothing, store, rows=rows, drop=options.drop or 0, seed=options.seed or 0,
                          own=(own, options.keep_share or 0), **common)
        held_out = Batches(aside, examples.nothing, store, rows=HELD_OUT_STEPS * len(aside), drop=0, seed=0, **common)
        return run_training(job, folder, learner, batches, held_out)


def run_training(job: Job, folder: Folder, learner: Learner, batches: Rows, held_out: Rows) -> str:
    """The training itself, with the UNet alone in memory."""
    options = learner.options
    with learner.at_work(), ExitStack() as stack:
        trained = learner.prepare()
        folder.check_space(outcome.bytes_needed(trained, options))
        clock = Clock(folder.inside, None, job.progress, 60 * (options.save_minutes or 0), curve=True)
        told = stack.enter_context(_tensorboard(folder.inside / "tensorboard"))

        def watch() -> dict[str, float]:
            _previews(learner, folder.inside / "previews")
            return {HELD_OUT: learner.measure(held_out)} if held_out.rows else {}

        steps = run_loop(options.task, trained.module, lambda step, _: learner.losses(batches, step),
                         outcome.recipe(options), clock, watch, options.every or 1, told)
        if rank():
            return ""
        return outcome.write(trained, job.model, job.load, model_path(job), folder, steps, learner.settings)


def estimate(job: Job) -> str:
    """Memory and time of a training, from a measured step. Nothing is written."""
    assert job.data is not None
    options = job.options.resolved()
    Folder(job.out).check({"options": options.plain()}, job.overwrite)
    found = data.read(job.data, options.sounds, options.strict)
    _check_count(found.clips, options)
    pipe = load_model(job, choose_device(job.load.get("device", "auto")), torch.float32)
    if options.trains_projection:
        check_projection(pipe)
    learner = _learner(job, options, pipe)
    trained, each, needed = measured(learner, frames_of(pipe, options))
    peak = gigabytes(peak_bytes(pipe.device))
    total = timedelta(seconds=round(each * (options.steps or 1)))
    return (f"{len(found.clips)} clips, {len(found.skipped)} left out; {trained.numbers:,} numbers are trained, "
            f"{dtype_name(learner.dtype)} on {pipe.device}\n"
            f"memory: {peak} at the peak of a step of {options.batch_size}; disk: {needed / 1e9:.2f} GB\n"
            f"time: {each:.2f} s a step, {total} for {options.steps} steps, and a little to encode the clips first")


def measured(learner: Learner, frames: int) -> tuple[outcome.Trained, float, int]:
    """What is trained, the seconds of a step of it, and the bytes of disk that the training needs."""
    options = learner.options
    with learner.at_work():
        trained = learner.prepare()
        optimizer = torch.optim.AdamW([p for p in trained.module.parameters() if p.requires_grad])
        seconds = min(_step_seconds(learner, optimizer, frames) for _ in range(2))
        return trained, seconds * (options.accumulate or 1), outcome.bytes_needed(trained, options)


def _step_seconds(learner: Learner, optimizer: torch.optim.Optimizer, frames: int) -> float:
    """The seconds that one batch takes, with latents and captions that are noise."""
    batch = learner.example(*noise_for(learner.pipe, frames, learner.options.batch_size or 1))
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    learner.error(batch).mean().backward()
    optimizer.step()
    if learner.pipe.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def noise_for(pipe: AudioLDM2, frames: int, rows: int) -> tuple[Tensor, Conditioning]:
    """Latents (rows, C, T, F) and captions that are noise, to measure with."""
    generator, config = torch.Generator().manual_seed(0), pipe.unet.config
    shape = rows, *pipe.latent_shape_for_frames(frames * pipe.vae.config.downsampling)
    contexts = tuple(torch.randn(rows, TOKENS, width, generator=generator) for width in config.context_widths)
    film = None if config.film_dim is None else torch.randn(rows, config.film_dim, generator=generator)
    return torch.randn(shape, generator=generator), Conditioning(contexts, (None,) * len(contexts), film)


def _previews(learner: Learner, folder: Path) -> None:
    """A sound of each prompt, as the model makes it now."""
    for number, prompt in enumerate(learner.options.preview, start=1):
        folder.mkdir(exist_ok=True)
        sound = learner.pipe.generate(prompt, seed=learner.options.seed, **learner.settings)
        sound.save(folder / f"step-{learner.step:06d}-{number}.wav", overwrite=True)


def store_of(folder: Folder, options: Training) -> Store:
    """Where what is computed once is kept."""
    return Store(folder.inside / "cache" if options.cache is None else Path(options.cache).expanduser())


def model_path(job: Job) -> Path:
    load = job.load
    return hub.resolve(job.model, load.get("revision"), bool(load.get("local_files_only")), variant=load.get("variant"))


def load_model(job: Job, device: torch.device, dtype: torch.dtype) -> AudioLDM2:
    """The model, whose parts are in memory only while they are at work."""
    named = {**job.load, "device": str(device), "dtype": dtype_name(dtype), "low_memory": True}
    return ldm2.load(job.model, **named)


def _learner(job: Job, options: Training, pipe: AudioLDM2) -> Learner:
    """The pipeline to train, in its dtype: frozen weights are in that of the computation, trained ones in float32."""
    dtype = dtype_of(options, pipe.device)
    frozen = options.low_rank and dtype != pipe.dtype
    return Learner(load_model(job, pipe.device, dtype) if frozen else pipe, options, dtype)


def dtype_of(options: Training, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if able else torch.float32
    return torch.bfloat16 if options.dtype == "bfloat16" else torch.float32


def frames_of(pipe: AudioLDM2, options: Training) -> int:
    """Latent frames of a crop."""
    return pipe.native_latent_frames if options.seconds is None else pipe.latent_shape(options.seconds)[1]


def _check_count(clips: Sized, options: Training) -> None:
    """Raise ValueError where there are fewer clips than in a batch."""
    needed = (options.batch_size or 1) * processes()
    if len(clips) < needed:
        raise ValueError(f"batch_size must be at most the number of clips to train on, which is {len(clips)}, "
                         f"got {needed}")


def tell_skipped(skipped: Sequence[str]) -> None:
    """Name the clips that are left out."""
    if skipped and rank() == 0:
        for line in skipped[:MOST_NAMED]:
            log.warning("left out: %s", line)
        log.warning("%d sounds are left out", len(skipped))


def by_the_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, in all of them."""
    found = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


@contextmanager
def together(job: Job) -> Iterator[torch.device]:
    """The device of this process, which trains with the others that torchrun has started, if it has."""
    count, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device = choose_device(job.load.get("device", "auto"))
    if count == 1 or "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Told]:
    """What writes the numbers of each step for TensorBoard; nothing where that is not installed."""
    if rank() or find_spec("tensorboard") is None:
        yield lambda step, values: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        yield lambda step, values: [writer.add_scalar(name, value, step) for name, value in values.items()]
