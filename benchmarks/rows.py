"""What is measured: the stages, a generation, its cost against length and batch, loading, kernels; a function each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ldm2
from benchmarks.flop import Flop
from benchmarks.kernels import kernels
from benchmarks.timing import Row, Run
from ldm2 import ops, profiling
from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.recipe import Recipe, recipe
from ldm2.unet import UNet

PROMPT = "a dog barking in the rain"
LENGTHS = (5.0, 10.0, 20.0, 40.0)
BATCHES = (1, 2, 4, 8)
SCALE = 3.5


@dataclass(frozen=True)
class Bench:
    """What all rows share. theirs: diffusers' pipeline, None where it is not installed. folder: the checkpoint of both.

    steps: of the generation; sweep_steps: of those of several lengths and batches.
    """

    ours: AudioLDM2
    theirs: Any | None
    folder: Path | None
    seconds: float
    steps: int
    sweep_steps: int
    their_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @functools.cached_property
    def flop(self) -> Flop:
        return Flop(self.ours)

    @functools.cached_property
    def theirs_compiled(self) -> Any:
        """diffusers' pipeline with a compiled UNet, and all else shared."""
        pipe = copy.copy(self.theirs)
        pipe.unet = torch.compile(self.theirs.unet)
        return pipe


def unet(bench: Bench) -> Iterator[Row]:
    """One step with guidance, everything before the loop done; on CUDA also of the largest batch."""
    gpu = bench.device.type == "cuda"
    for rows in (1, max(BATCHES)) if gpu else (1,):
        name = f"UNet step, {f'{rows} x ' if rows > 1 else ''}{bench.seconds:g} s"
        warm = 4 if gpu else 1                             # the third call is recorded as a graph
        flop = bench.flop.step(bench.seconds, rows)
        yield Row("unet", name, functools.partial(_steps, bench, rows), flop, warm)


def _steps(bench: Bench, rows: int) -> dict[str, Run]:
    settings = {"seconds": bench.seconds, "steps": bench.steps, "guidance_scale": SCALE, "seed": 0}
    asked = recipe(PROMPT, num_waveforms=rows, **settings)
    step = next(work.run for work in profiling.works(bench.ours, asked) if work.name == "UNet step")
    runs = {"ldm2": lambda: ops.guide(step(), SCALE)}
    compiling = bench.device.type == "cuda" and rows == 1
    if compiling:
        from ldm2.compilation import compile_step

        compiled = copy.copy(bench.ours.unet)              # shares the weights
        compile_step(compiled)
        runs["ldm2, no CUDA graph"] = _eager_step(bench, asked, bench.ours.unet)
        runs["ldm2, compiled, no CUDA graph"] = _eager_step(bench, asked, compiled)
        runs["ldm2, plain PyTorch"] = _plain(runs["ldm2"])
    if bench.theirs is not None:
        if compiling:
            runs["diffusers, torch.compile"] = _their_step(bench, rows, bench.theirs_compiled.unet)
        runs["diffusers"] = _their_step(bench, rows, bench.theirs.unet)
    return runs


def _plain(run: Run) -> Run:
    def plain() -> object:
        with ops.backend("reference"):
            return run()

    return plain


def _eager_step(bench: Bench, asked: Recipe, unet: UNet) -> Run:
    """ldm2's step as calls of `unet`, never as a graph."""
    pipe = bench.ours
    with torch.no_grad():
        both = Conditioning.join(pipe.conditionings(asked)[::-1])
        prepared = unet.prepare(both.to(pipe.device, pipe.dtype))
        time = unet.embed_time(1.0)
    x = torch.randn(1, *pipe.latent_shape(asked.seconds)).to(pipe.device, pipe.dtype)

    @torch.no_grad()
    def step() -> object:
        return ops.guide(unet(x, 1.0, prepared, time=time), SCALE)

    return step


def _their_step(bench: Bench, rows: int, unet: Callable) -> Run:
    """diffusers' step, called as in its pipeline: both branches, then guidance."""
    words, mask, generated = bench.theirs.encode_prompt(PROMPT, bench.device, rows, True)
    x = torch.randn(rows, *bench.ours.latent_shape(bench.seconds), device=bench.device, dtype=bench.their_dtype)
    words, generated, t = words.to(x), generated.to(x), torch.tensor(1, device=bench.device)

    @torch.no_grad()
    def step() -> object:
        noise = unet(torch.cat([x] * 2), t, encoder_hidden_states=generated, encoder_hidden_states_1=words,
                     encoder_attention_mask_1=mask, return_dict=False)[0]
        negative, positive = noise.chunk(2)
        return negative + SCALE * (positive - negative)

    return step


def vae(bench: Bench) -> Iterator[Row]:
    """Latents -> log-mel."""
    latents = torch.randn(1, *bench.ours.latent_shape(bench.seconds), device=bench.device)

    def prepare() -> dict[str, Run]:
        runs = {"ldm2": lambda: bench.ours.decode(latents)}
        if bench.theirs is not None:
            part = bench.theirs.vae
            x = latents.to(bench.their_dtype)
            runs["diffusers"] = torch.no_grad()(lambda: part.decode(x / part.config.scaling_factor).sample)
        return runs

    yield Row("vae", f"VAE decode, {bench.seconds:g} s", prepare, bench.flop.decode(bench.seconds))


def vocoder(bench: Bench) -> Iterator[Row]:
    """Log-mel -> waveform."""
    mel = bench.ours.decode(torch.randn(1, *bench.ours.latent_shape(bench.seconds)))

    def prepare() -> dict[str, Run]:
        runs = {"ldm2": lambda: bench.ours.vocode(mel)}
        if bench.theirs is not None:
            theirs = mel.to(bench.their_dtype)
            runs["diffusers"] = torch.no_grad()(lambda: bench.theirs.mel_spectrogram_to_waveform(theirs))
        return runs

    yield Row("vocoder", f"vocoder, {bench.seconds:g} s", prepare, bench.flop.vocode(bench.seconds))


def text(bench: Bench) -> Iterator[Row]:
    """Prompt -> both sides of guidance."""
    asked = recipe(PROMPT, guidance_scale=SCALE, seed=0)

    def prepare() -> dict[str, Run]:
        runs = {"ldm2": lambda: bench.ours.conditionings(asked)}
        if bench.theirs is not None:
            runs["diffusers"] = torch.no_grad()(lambda: bench.theirs.encode_prompt(PROMPT, bench.device, 1, True))
        return runs

    yield Row("text", "text", prepare)


def load(bench: Bench) -> Iterator[Row]:
    """Files -> a pipeline that is ready."""
    if bench.folder is None:
        return
    from tests import checkpoints

    settings = {"reference": "diffusers", "device": str(bench.device), "dtype": str(bench.ours.dtype)[6:]}

    def prepare() -> dict[str, Run]:
        return {
            "ldm2": lambda: ldm2.load(bench.folder, **settings),
            "diffusers": lambda: checkpoints.diffusers_pipeline(bench.folder, bench.their_dtype).to(bench.device),
        }

    yield Row("load", "load", prepare)


def generation(bench: Bench) -> Iterator[Row]:
    """Prompt -> waveform."""
    gpu = bench.device.type == "cuda"
    prepare = functools.partial(_generations, bench, bench.seconds, bench.steps, compiled=gpu)
    flop = bench.flop.generation(bench.seconds, bench.steps)
    yield Row("generation", f"{bench.seconds:g} s, {bench.steps} steps", prepare, flop)


def length(bench: Bench) -> Iterator[Row]:
    """The same for several lengths; longer ones also in windows, which is how reference="authors" makes them."""
    for seconds in LENGTHS:
        prepare = functools.partial(_generations, bench, seconds, bench.sweep_steps, windows=seconds > 10.24)
        flop = bench.flop.generation(seconds, bench.sweep_steps)
        name = f"{seconds:g} s, {bench.sweep_steps} steps"
        yield Row("length", name, prepare, flop, warm=int(bench.device.type == "cuda" or seconds == LENGTHS[0]))


def batch(bench: Bench) -> Iterator[Row]:
    """The same for several sounds at once."""
    for rows in BATCHES:
        prepare = functools.partial(_generations, bench, bench.seconds, bench.sweep_steps, rows=rows)
        flop = bench.flop.generation(bench.seconds, bench.sweep_steps, rows)
        name = f"{rows} x {bench.seconds:g} s, {bench.sweep_steps} steps"
        yield Row("batch", name, prepare, flop, warm=int(bench.device.type == "cuda" or rows == BATCHES[0]))


def _generations(bench: Bench, seconds: float, steps: int, rows: int = 1, windows: bool = False,
                 compiled: bool = False) -> dict[str, Run]:
    """windows: ldm2 also in windows. compiled: diffusers also with a compiled UNet."""
    prompts = [PROMPT] * rows
    settings = {"seconds": seconds, "steps": steps, "guidance_scale": SCALE, "seed": 0}

    def theirs(pipe: Any) -> Run:
        return lambda: pipe(
            prompts, audio_length_in_s=seconds, num_inference_steps=steps, guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(0),
        )

    runs = {"ldm2": lambda: bench.ours.generate(prompts, **settings)}
    if windows:
        runs["ldm2, windows of 10.24 s"] = lambda: bench.ours.generate(prompts, window=10.24, **settings)
    if bench.theirs is not None:
        if compiled:
            runs["diffusers, torch.compile"] = theirs(bench.theirs_compiled)
        runs["diffusers"] = theirs(bench.theirs)
    return runs


SUBJECTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "unet": unet, "vae": vae, "vocoder": vocoder, "text": text, "load": load, "generation": generation,
    "length": length, "batch": batch, "kernels": kernels,
}
