"""What is measured: the stages, a generation, its cost against length and batch, loading, kernels; a function each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ldm2
from benchmarks.bench import Bench
from benchmarks.kernels import kernels
from benchmarks.timing import Make, Row, Run
from ldm2 import ops
from ldm2.conditioning import Conditioning
from ldm2.guidance import guide
from ldm2.runtime.compilation import compile_step, stepper
from ldm2.runtime.graphs import GraphedUNet, accelerated
from ldm2.settings import Settings
from ldm2.unet import UNet

PROMPT = "a dog barking in the rain"
LENGTHS = (5.0, 10.0, 20.0, 40.0)
BATCHES = (1, 2, 4, 8)
SCALE = 3.5
STEPS = 10                                                 # of the UNet for one measurement on CUDA


def unet(bench: Bench) -> Iterator[Row]:
    """One step with guidance, everything before the loop done; on CUDA also of the largest batch, and each without what
    makes ldm2 fast there."""
    plain = bench.ours.unet
    for rows in (1, max(BATCHES)) if bench.device.type == "cuda" else (1,):
        step = functools.partial(_our_step, bench, rows)
        ours = {"ldm2": functools.partial(step, accelerated(plain))}
        if bench.device.type == "cuda":
            ours["ldm2, no CUDA graph"] = functools.partial(step, plain)
            ours["ldm2, plain PyTorch"] = functools.partial(step, plain, backend="reference")
        yield _step_row(bench, "unet", bench.beside(ours, functools.partial(_their_step, bench, rows)), rows)


def diffusers_compiled(bench: Bench) -> Iterator[Row]:
    """The step beside diffusers with a compiled UNet."""
    if bench.make_theirs is not None:
        yield _step_row(bench, "diffusers-compiled", {
            "ldm2": functools.partial(_our_step, bench, 1, accelerated(bench.ours.unet)),
            "diffusers, torch.compile": functools.partial(_their_step, bench, 1, compiled=True),
        })


def ldm2_compiled(bench: Bench) -> Iterator[Row]:
    """The step of a compiled UNet of ours, on CUDA also as a graph, beside the one that is not compiled."""
    unet = copy.copy(bench.ours.unet)                      # shares the weights
    compile_step(unet)
    step = functools.partial(_our_step, bench, 1)
    variants = {"ldm2, compiled, no CUDA graph": functools.partial(step, stepper(unet))}
    if bench.device.type == "cuda":
        variants = {"ldm2, compiled": functools.partial(step, accelerated(unet))} | variants
    yield _step_row(bench, "ldm2-compiled", variants | {"ldm2": functools.partial(step, accelerated(bench.ours.unet))})


def _step_row(bench: Bench, subject: str, variants: dict[str, Make], rows: int = 1) -> Row:
    name = f"UNet step, {f'{rows} x ' if rows > 1 else ''}{bench.seconds:g} s"
    calls = STEPS if bench.device.type == "cuda" else 1
    return Row(subject, name, variants, bench.flop.step(bench.seconds, rows), calls=calls)


def _our_step(bench: Bench, rows: int, unet: UNet | GraphedUNet, backend: str = "auto") -> Run:
    """ldm2's step, called as in its pipeline: both branches, then guidance."""
    pipe = bench.ours
    settings = Settings(PROMPT, num_waveforms=rows, seconds=bench.seconds, guidance_scale=SCALE, seed=0).resolved()
    with torch.inference_mode():
        both = Conditioning.join(pipe.conditionings(settings)[::-1])
        prepared = pipe.unet.prepare(both.to(pipe.device, pipe.dtype))
        time = pipe.unet.embed_time(1.0)
        x = torch.randn(rows, *pipe.latent_shape(bench.seconds)).to(pipe.device, pipe.dtype)

    @torch.inference_mode()
    def step() -> Tensor:
        with ops.backend(backend):
            return guide(unet(x, 1.0, prepared, time=time), SCALE)

    return step


def _their_step(bench: Bench, rows: int, compiled: bool = False) -> Run:
    """diffusers' step, called as in its pipeline: both branches, then guidance."""
    unet = (bench.theirs_compiled if compiled else bench.theirs).unet
    words, mask, generated = bench.theirs.encode_prompt(PROMPT, bench.device, rows, True)
    x = torch.randn(rows, *bench.ours.latent_shape(bench.seconds), device=bench.device, dtype=bench.their_dtype)
    words, generated, t = words.to(x), generated.to(x), torch.tensor(1, device=bench.device)

    @torch.no_grad()
    def step() -> Tensor:
        noise = unet(torch.cat([x] * 2), t, encoder_hidden_states=generated, encoder_hidden_states_1=words,
                     encoder_attention_mask_1=mask, return_dict=False)[0]
        negative, positive = noise.chunk(2)
        return negative + SCALE * (positive - negative)

    return step


def vae(bench: Bench) -> Iterator[Row]:
    """Latents -> log-mel."""
    latents = torch.randn(1, *bench.ours.latent_shape(bench.seconds), device=bench.device)

    def ours() -> Run:
        return lambda: bench.ours.decode(latents)

    def theirs() -> Run:
        part, x = bench.theirs.vae, latents.to(bench.their_dtype)
        return torch.no_grad()(lambda: part.decode(x / part.config.scaling_factor).sample)

    variants = bench.beside({"ldm2": ours}, theirs)
    yield Row("vae", f"VAE decode, {bench.seconds:g} s", variants, bench.flop.decode(bench.seconds))


def vocoder(bench: Bench) -> Iterator[Row]:
    """Log-mel -> waveform."""
    mel = bench.ours.decode(torch.randn(1, *bench.ours.latent_shape(bench.seconds)))

    def ours() -> Run:
        return lambda: bench.ours.vocode(mel)

    def theirs() -> Run:
        pipe, other = bench.theirs, mel.to(bench.their_dtype)
        return torch.no_grad()(lambda: pipe.mel_spectrogram_to_waveform(other))

    variants = bench.beside({"ldm2": ours}, theirs)
    yield Row("vocoder", f"vocoder, {bench.seconds:g} s", variants, bench.flop.vocode(bench.seconds))


def text(bench: Bench) -> Iterator[Row]:
    """Prompt -> both sides of guidance."""
    settings = Settings(PROMPT, guidance_scale=SCALE, seed=0).resolved()

    def ours() -> Run:
        return lambda: bench.ours.conditionings(settings)

    def theirs() -> Run:
        pipe = bench.theirs
        return torch.no_grad()(lambda: pipe.encode_prompt(PROMPT, bench.device, 1, True))

    yield Row("text", "text", bench.beside({"ldm2": ours}, theirs))


def load(bench: Bench) -> Iterator[Row]:
    """Files -> a pipeline that is ready."""
    if bench.folder is None:
        return
    settings = {"reference": "diffusers", "device": str(bench.device), "dtype": str(bench.ours.dtype)[6:]}
    ours = functools.partial(ldm2.load, bench.folder, **settings)
    yield Row("load", "load", bench.beside({"ldm2": lambda: ours}, lambda: bench.make_theirs))


def generation(bench: Bench) -> Iterator[Row]:
    """Prompt -> waveform."""
    yield _generation_row(bench, "generation", _generations(bench, bench.seconds, bench.steps))


def generation_compiled(bench: Bench) -> Iterator[Row]:
    """A generation beside diffusers with a compiled UNet."""
    if bench.make_theirs is not None:
        yield _generation_row(bench, "generation-compiled", {
            "ldm2": functools.partial(_our_sound, bench, 1, bench.seconds, bench.steps),
            "diffusers, torch.compile": functools.partial(_their_sound, bench, 1, bench.seconds, bench.steps, True),
        })


def _generation_row(bench: Bench, subject: str, variants: dict[str, Make]) -> Row:
    flop = bench.flop.generation(bench.seconds, bench.steps)
    return Row(subject, f"{bench.seconds:g} s, {bench.steps} steps", variants, flop)


def length(bench: Bench) -> Iterator[Row]:
    """Generations of several lengths; longer ones also in windows, which is how reference="authors" makes them."""
    for seconds in LENGTHS:
        variants = _generations(bench, seconds, bench.sweep_steps, windows=seconds > 10.24)
        flop = bench.flop.generation(seconds, bench.sweep_steps)
        name = f"{seconds:g} s, {bench.sweep_steps} steps"
        yield Row("length", name, variants, flop, warm=int(bench.device.type == "cuda" or seconds == LENGTHS[0]))


def batch(bench: Bench) -> Iterator[Row]:
    """Generations of several sounds at once."""
    for rows in BATCHES:
        variants = _generations(bench, bench.seconds, bench.sweep_steps, rows)
        flop = bench.flop.generation(bench.seconds, bench.sweep_steps, rows)
        name = f"{rows} x {bench.seconds:g} s, {bench.sweep_steps} steps"
        yield Row("batch", name, variants, flop, warm=int(bench.device.type == "cuda" or rows == BATCHES[0]))


def _generations(bench: Bench, seconds: float, steps: int, rows: int = 1, windows: bool = False) -> dict[str, Make]:
    """windows: ldm2 also in windows."""
    size = (bench, rows, seconds, steps)
    ours = {"ldm2": functools.partial(_our_sound, *size)}
    if windows:
        ours["ldm2, windows of 10.24 s"] = functools.partial(_our_sound, *size, window=10.24)
    return bench.beside(ours, functools.partial(_their_sound, *size))


def _our_sound(bench: Bench, rows: int, seconds: float, steps: int, **settings: float) -> Run:
    return lambda: bench.ours.generate(
        [PROMPT] * rows, seconds=seconds, steps=steps, guidance_scale=SCALE, seed=0, **settings
    )


def _their_sound(bench: Bench, rows: int, seconds: float, steps: int, compiled: bool = False) -> Run:
    pipe = bench.theirs_compiled if compiled else bench.theirs
    return lambda: pipe(
        [PROMPT] * rows, audio_length_in_s=seconds, num_inference_steps=steps, guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(0),
    )


# Minutes go by until these are compiled, so that they are measured where they are asked for by name.
COMPILED: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "diffusers-compiled": diffusers_compiled, "generation-compiled": generation_compiled,
    "ldm2-compiled": ldm2_compiled,
}
SUBJECTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "unet": unet, "vae": vae, "vocoder": vocoder, "text": text, "load": load, "generation": generation,
    "length": length, "batch": batch, "kernels": kernels,
} | COMPILED
