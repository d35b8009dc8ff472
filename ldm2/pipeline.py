"""AudioLDM2: the one place where the parts meet.

prompts -> Conditioning (text) -> latents (UNet and sampler) -> log-mel (VAE) -> waveform (HiFi-GAN)
Reference: "AudioLDM 2: Learning Holistic Audio Generation with Self-supervised Pretraining", arXiv:2308.05734.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm2 import __version__, samplers, tiling
from ldm2.conditioning import Conditioning
from ldm2.edit import edits, reconstruction, sound
from ldm2.guidance import Guidance
from ldm2.noise import SeededNoise
from ldm2.result import Result
from ldm2.runtime import graphs, weight_layout
from ldm2.runtime.inference import inference, ordinary
from ldm2.runtime.memory import STAGES, Stage, in_stage
from ldm2.samplers import Step
from ldm2.samplers.core import Denoiser
from ldm2.schedules import Schedule
from ldm2.settings import DEFAULTS, Recipe, check_count, check_interval, check_spacing, recipe
from ldm2.text.encoder import TextEncoder
from ldm2.text.encoders import ClapText
from ldm2.text.ranking import Ranker, best_first
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder
from ldm2.windows import Window, average, plan

Callback = Callable[[int, int, Tensor], object]
MakeRanker = Callable[[ClapText, torch.device], Ranker]

_making_ranker = threading.Lock()                          # one thread makes it, the others wait for it


class NonFiniteError(ArithmeticError):
    """A stage returned NaN or infinite numbers; the message names the stage and the way out."""


class AudioLDM2:
    """Text to sound. Built by `ldm2.load`; the stages are methods of their own, `generate` runs them all.

    unet, vae, vocoder: the modules; text: the text encoders; schedule: the noise schedule of the training.
    device, dtype: where and in which precision the UNet, VAE and vocoder run; the sampler's state stays float32.
    make_ranker:   make_ranker(clap, device) loads what ranks candidates (CLAP's audio branch) when it is first needed.
    stages:        those whose parts sleep outside of them, weights on the meta device (`ldm2.load(low_memory=True)`):
                   whoever uses such a part directly does so `with pipe.stages["unet"]:`.
    """

    def __init__(
        self, unet: UNet, vae: VAE, vocoder: Vocoder, text: TextEncoder, schedule: Schedule, *,
        device: torch.device, dtype: torch.dtype, defaults: Mapping[str, object] = DEFAULTS,
        origin: Mapping[str, object] | None = None, make_ranker: MakeRanker | None = None,
        stages: Sequence[Stage] = (),
    ):
        self.unet, self.vae, self.vocoder, self.text, self.schedule = unet, vae, vocoder, text, schedule
        self.device, self.dtype = device, dtype
        self.defaults = dict(DEFAULTS) | dict(defaults)
        self.origin = dict(origin or {})
        self._make_ranker, self._ranker = make_ranker, None
        self.stages = {name: Stage(name, device) for name in STAGES} | {stage.name: stage for stage in stages}
        self.low_memory = bool(stages)

    def __repr__(self) -> str:
        return f"AudioLDM2({self.origin.get('model')!r}, {str(self.dtype)[6:]} on {self.device})"

    def move(self, device: torch.device, dtype: torch.dtype, text: TextEncoder) -> None:
        """Move UNet, VAE and vocoder, with the weights they have now. text: the text side, which is there already.

        Raises ValueError for a pipeline whose parts come and go (low_memory).
        """
        if self.low_memory:
            raise ValueError(f"a pipeline with low_memory reads its parts for {self.device}: load it anew for {device}")
        graphs.forget(self.unet)
        for module in (self.unet, self.vae, self.vocoder):
            weight_layout.arrange(module.to(device, dtype))
        self.device, self.dtype, self.text, self._ranker = device, dtype, text, None
        self.origin |= {"dtype": str(dtype)[6:]}
        for stage in self.stages.values():
            stage.device = device

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""
        return self.vocoder.config.sample_rate

    def latent_shape(self, seconds: float) -> tuple[int, int, int]:
        """(C, T/f, F/f) of the latents that hold `seconds` of sound, rounded up. Raises ValueError below one sample."""
        num_samples = round(seconds * self.sample_rate)
        if num_samples < 1:
            raise ValueError(f"seconds must be at least one sample at {self.sample_rate} Hz, got {seconds:g}")
        return self.latent_shape_of(math.ceil(num_samples / self.vocoder.config.hop_length))

    def latent_shape_of(self, num_frames: int) -> tuple[int, int, int]:
        """(C, T/f, F/f) of the latents that hold `num_frames` mel frames, rounded up."""
        factor = self.vae.config.downsampling
        return self.unet.config.in_channels, math.ceil(num_frames / factor), self.vocoder.config.num_mels // factor

    @property
    def own_frames(self) -> int:
        """Latent frames of the pieces that the model was trained on; longer sounds are made in windows of as many."""
        return self.unet.config.sample_size or 256

    @property
    def piece_frames(self) -> int:
        """Latent frames that the VAE takes at once, 10.24 s at 16 kHz or more: a bound on memory."""
        return max(self.own_frames, 256)

    @property
    def whole(self) -> bool:
        """Whether sound of any length is made in one piece, as diffusers does, unless windows are asked for."""
        return self.text.reference == "diffusers"

    @property
    def frame_samples(self) -> int:
        """Samples per latent frame."""
        return self.vae.config.downsampling * self.vocoder.config.hop_length

    def windows(
        self, num_frames: int, window: float | None = None, overlap: float | None = None, *, loop: bool = False,
        changes: Sequence[float] = (),
    ) -> list[Window] | None:
        """How `denoise` splits a timeline of latent frames; None where the UNet sees all of it at once.

        window:  seconds that the UNet sees at once, default the model's own length (reference="diffusers": any length)
        overlap: seconds that neighbours share, default a quarter of the window; must be shorter than it
        loop:    the end goes on at the start. changes: seconds at which another prompt begins
        """
        if self.whole and window is None and not loop and not changes:
            return None
        frames = self.sample_rate / self.frame_samples                       # per second
        width = self.own_frames if window is None else max(1, round(window * frames))
        shared = width // 4 if overlap is None else round(overlap * frames)
        if shared >= width:
            raise ValueError(f"overlap must be shorter than the window of {width / frames:g} seconds, got {overlap:g}")
        borders = (0, *(change * frames for change in changes))
        windows = plan(num_frames, width, shared, loop=loop, borders=borders)
        return windows if len(windows) > 1 else None

    @in_stage("text")
    @inference
    def encode(
        self, prompt: str | Sequence[str], *, transcription: str | Sequence[str] | None = None,
        phonemes: str | Sequence[str] | None = None,
    ) -> Conditioning:
        """Prompts -> what the UNet is conditioned on, one row for each prompt.

        transcription, phonemes: what speech models say, as English text or in IPA; other models take neither.
        """
        return self.text.encode(prompt, transcription=transcription, phonemes=phonemes)

    @in_stage("text")
    @inference
    def encode_unconditional(
        self, conditioning: Conditioning, negative_prompt: str | Sequence[str] | None = None, *,
        transcription: str | Sequence[str] | None = None, phonemes: str | Sequence[str] | None = None,
    ) -> Conditioning:
        """The other side of guidance for the rows of `conditioning`: unconditional, or negative prompts."""
        return self.text.encode_unconditional(
            conditioning, negative_prompt, transcription=transcription, phonemes=phonemes
        )

    @in_stage("unet")
    @inference
    def denoise(
        self, conditioning: Conditioning, unconditional: Conditioning | None = None, *, latents: Tensor, steps: int,
        guidance_scale: float = 1.0, sampler: str = "ddim", eta: float = 0.0,
        noise: Callable[[Tensor], Tensor] | None = None, windows: Sequence[Window] | None = None,
        x0: Tensor | None = None, start: int = 0, edit: Callable[[Step], Tensor] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0), reuse: int = 1, spacing: str | None = None,
        callback: Callback | None = None, progress: bool = False,
    ) -> Tensor:
        """Standard normal `latents` (B, C, T/f, F/f) -> latents of sound, same shape, float32.

        conditioning, unconditional: B rows each; the latter is needed for guidance_scale > 1 and unused otherwise.
        windows: what the UNet sees at once (see `windows`), all if None. For prompts over time the conditionings have B
        rows for the first prompt, then B for the second, and so on.
        x0, start, edit: a late start from latents of sound, and what is held fixed: see samplers.sample.
        guidance_interval, reuse, spacing: see `generate`.
        noise: draws what stochastic samplers add. callback(step, total, latents) may return False: raises Cancelled.
        """
        interval, reuse = check_interval(guidance_interval), check_count("reuse", reuse)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be callable, got {callback!r}")
        schedule = self.schedule.with_spacing(check_spacing(spacing))
        guided = functools.partial(
            Guidance, self.unet, scale=guidance_scale, dtype=self.dtype,
            timesteps=samplers.timesteps(sampler, schedule, steps),
            acts_at=lambda t: schedule.within(t, interval),
        )
        if windows is None:
            denoiser = guided(conditioning, unconditional).denoiser(reuse)
        else:
            denoiser = self._windowed(guided, windows, conditioning, unconditional, rows=len(latents), reuse=reuse)
        with tqdm(total=steps - start, unit="step", disable=not progress or sys.stderr is None, leave=False) as bar:

            def after_step(done: int, total: int, latents: Tensor) -> object:
                bar.update()
                return None if callback is None else callback(done, total, latents)

            latents = samplers.sample(
                sampler, denoiser, latents.to(self.device, torch.float32), schedule, steps,
                eta=eta, noise=noise, x0=x0, start=start, edit=edit, callback=after_step,
            )
        return self.finite(latents, "the sampler's latents")

    def _windowed(
        self, guided: Callable[..., Guidance], windows: Sequence[Window], conditioning: Conditioning,
        unconditional: Conditioning | None, rows: int, reuse: int,
    ) -> Denoiser:
        """The mean of the windows' denoisers. On a GPU several windows are one model call."""
        asked = rows * (1 + max(window.prompt for window in windows))
        if conditioning.batch_size < asked:
            raise ValueError(f"the windows need a conditioning of {asked} rows or more, got {conditioning.batch_size}")

        @functools.cache
        def guidance(prompts: tuple[int, ...]) -> Guidance:
            places = [prompt * rows + row for prompt in prompts for row in range(rows)]
            other = None if unconditional is None else unconditional.select(places)
            return guided(conditioning.select(places), other)

        at_once = 1 if self.device.type == "cpu" else max(1, 8 // rows)
        there = [window.to(self.device) for window in windows]
        return average(there, lambda prompts: guidance(prompts).denoiser(reuse), at_once)

    @in_stage("vae")
    @inference
    def decode(self, latents: Tensor, *, loop: bool = False, tile: int | None = None) -> Tensor:
        """Latents (B, C, T/f, F/f), scaled as `denoise` returns them -> log-mel (B, 1, T, F) in the model's dtype.

        tile: latent frames to decode at once, default `piece_frames` (reference="diffusers": all of them).
        loop: the end goes on at the start.
        """
        unscaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        if tile is None:
            tile = latents.shape[2] if self.whole and not loop else self.piece_frames
        tiles = plan(latents.shape[2], tile, tile // 4, loop=loop)
        mel = torch.cat([tiling.decode(self.vae, row, tiles) for row in unscaled.to(self.dtype).split(1)])
        return self.finite(mel, "the VAE's log-mel spectrogram")

    @in_stage("vocoder")
    @inference
    def vocode(self, mel: Tensor, *, loop: bool = False) -> Tensor:
        """Log-mel (B, 1, T, F) -> waveform (B, N), float32 on the CPU; N is at least T * hop_length.

        loop: the end goes on at the start; N is T * hop_length then.
        """
        mel = mel.to(self.device, self.dtype)
        short = mel.shape[2] <= self.own_frames * self.vae.config.downsampling
        chunk = mel.shape[2] if short else tiling.CHUNK_FRAMES
        waveform = torch.cat([tiling.vocode(self.vocoder, row, chunk, loop) for row in mel.split(1)])
        return self.finite(waveform, "the vocoder's waveform")

    encode_audio = sound.encode_audio
    reconstruct = reconstruction.reconstruct
    transfer = edits.transfer
    variations = edits.variations
    inpaint = edits.inpaint
    extend = edits.extend
    super_resolution = edits.super_resolution

    def generate(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None, *,
        seconds: float | None = None, steps: int | None = None, guidance_scale: float | None = None,
        sampler: str | None = None, eta: float = 0.0, seed: int | Sequence[int] | None = None, num_waveforms: int = 1,
        transcription: str | Sequence[str] | None = None, phonemes: str | Sequence[str] | None = None,
        latents: Tensor | None = None, window: float | None = None, overlap: float | None = None, loop: bool = False,
        prompt_at: Sequence[tuple[float, str]] = (), preset: str | None = None,
        guidance_interval: tuple[float, float] | None = None, reuse: int | None = None, spacing: str | None = None,
        callback: Callback | None = None, progress: bool = False,
    ) -> Result:
        """Sound for one prompt or several.

        prompt:          what to hear; a list makes a batch whose rows do not influence each other
        negative_prompt: what to keep away from: one for all, or one for each prompt
        seconds:         length, above 0; default 10.24 or what the checkpoint asks for (as for the next three)
        steps:           sampler steps, default 200
        guidance_scale:  classifier-free guidance, arXiv:2207.12598; default 3.5; one or less turns it off
        sampler:         one of ldm2.samplers.SAMPLERS, default "ddim"
        eta:             share of fresh noise in DDIM, 0 to 1
        seed:            0 to 2**64 - 1: row i uses seed + i, or seed[i]; -1 is 2**64 - 1, as in torch; None draws one,
                         which the result records
        num_waveforms:   candidates of each prompt, returned best first by CLAP similarity with their prompt
        transcription:   what speech models say, English text: one for all prompts, or one for each
        phonemes:        the same as ready phonemes in IPA
        latents:         standard normal (rows, C, T/f, F/f) to start from in place of the seeds' own
        window:          seconds that the UNet sees at once, default the model's own length: longer sounds are made in
                         overlapping windows, arXiv:2302.08113
        overlap:         seconds that neighbouring windows share, default a quarter of a window
        loop:            make the end go on at the start; rounds the length to whole latent frames (0.04 s at 16 kHz)
        prompt_at:       [(seconds, prompt), ...]: prompts that take over from `prompt` at these times
        preset:          one of ldm2.settings.PRESETS, values for what is not given here: "fast" has about a tenth of
                         the default's work; how far it is from it: python -m benchmarks.tradeoff
        guidance_interval: (start, end), shares of the run from 0 (noise) to 1 (sound) between which there is guidance,
                         arXiv:2404.07724; outside a step costs half. Default (0, 1). Levels: see Schedule.within
        reuse:           the UNet's deep features are computed in every so many steps, arXiv:2312.00858; default 1
        spacing:         of the timesteps: "leading", "trailing" (the first is the training's last) or "linspace",
                         arXiv:2305.08891, table 2; default the checkpoint's own
        callback:        called as callback(step, total, latents) after each step; False stops with ldm2.Cancelled
        progress:        show a progress bar on stderr

        Raises ValueError for arguments out of range and NonFiniteError if a stage overflows its dtype.
        """
        asked = recipe(
            prompt, negative_prompt, seconds=seconds, steps=steps, guidance_scale=guidance_scale, sampler=sampler,
            eta=eta, seed=seed, num_waveforms=num_waveforms, transcription=transcription, phonemes=phonemes,
            window=window, overlap=overlap, loop=loop, prompt_at=prompt_at, preset=preset,
            guidance_interval=guidance_interval, reuse=reuse, spacing=spacing, defaults=self.defaults,
        )
        if asked.loop:
            asked = replace(asked, seconds=self._whole_frames(asked.seconds))
        noise = SeededNoise(asked.seeds)
        shape = self.latent_shape(asked.seconds)
        latents = noise.draw(*shape) if latents is None else self._given_latents(latents, (len(asked.seeds), *shape))
        changes = [start for start, _ in asked.prompt_at]
        windows = self.windows(shape[1], asked.window, asked.overlap, loop=asked.loop, changes=changes)
        conditioning, unconditional = self.conditionings(asked)
        latents = self.denoise(
            conditioning, unconditional, latents=latents, steps=asked.steps, guidance_scale=asked.guidance_scale,
            sampler=asked.sampler, eta=asked.eta, guidance_interval=asked.guidance_interval, reuse=asked.reuse,
            spacing=asked.spacing, noise=noise, windows=windows, callback=callback, progress=progress,
        )
        mel = self.decode(latents, loop=asked.loop)
        waveforms = self.vocode(mel, loop=asked.loop)[:, : round(asked.seconds * self.sample_rate)]
        return self._result(asked, waveforms.numpy(), latents.cpu(), mel[:, 0].float().cpu())

    @in_stage("text")
    def conditionings(self, asked: Recipe) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance, a row for each waveform and prompt over time; the second is None without guidance."""
        over_time = 1 + len(asked.prompt_at)

        def each(texts: Sequence[str] | None) -> list[str] | None:
            return None if texts is None else [*texts] * over_time

        speech = {"transcription": each(asked.transcription), "phonemes": each(asked.phonemes)}
        later = [text for _, text in asked.prompt_at for _ in asked.prompts]
        conditioning = self.encode([*asked.prompts, *later], **speech)
        if not asked.guided:
            return conditioning.repeat(asked.num_waveforms), None
        unconditional = self.encode_unconditional(conditioning, each(asked.negative_prompts), **speech)
        return conditioning.repeat(asked.num_waveforms), unconditional.repeat(asked.num_waveforms)

    def _whole_frames(self, seconds: float) -> float:
        """The length of the whole number of latent frames, one at least, that is nearest to `seconds`."""
        return max(1, round(seconds * self.sample_rate / self.frame_samples)) * self.frame_samples / self.sample_rate

    def _result(self, asked: Recipe, waveforms: np.ndarray, latents: Tensor, mel: Tensor) -> Result:
        """Rank the candidates of each prompt, if there are several, and collect everything."""
        order, scores = list(range(len(waveforms))), None
        if asked.num_waveforms > 1:
            order, scores = self.rank(waveforms, asked.prompts)
        return Result(
            waveforms=waveforms[order], sample_rate=self.sample_rate, latents=latents[order], mel=mel[order],
            seeds=[asked.seeds[row] for row in order], scores=scores,
            settings=asked.settings | self.origin | {"ldm2": __version__},
        )

    @in_stage("ranking")
    def rank(self, waveforms: np.ndarray, prompts: Sequence[str]) -> tuple[list[int], list[float]]:
        """Rows of `waveforms` (P * n, N) best first for each of P prompts, and their CLAP similarities in that order.

        Raises ValueError if the checkpoint has no audio branch of CLAP to rank with.
        """
        if self._make_ranker is None:
            raise ValueError("this checkpoint has no CLAP audio branch to rank with: ask for one waveform a prompt")
        with self.stages["text"]:                          # whose branch of CLAP the ranker uses
            ranker = self._ranking()
            scores = ranker.scores(list(prompts), waveforms, self.sample_rate)
        order = best_first(scores)
        return order, scores.flatten()[order].tolist()

    def _ranking(self) -> Ranker:
        """What ranks; kept from the first time on, unless there is little memory."""
        with _making_ranker:
            with ordinary():
                ranker = self._ranker or self._make_ranker(self.text.clap, self.device)
            if not self.low_memory:
                self._ranker = ranker
        return ranker

    def _given_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of shape {shape} for these settings, got {found}")
        return latents

    def finite(self, values: Tensor, stage: str) -> Tensor:
        """`values`, if all of them are finite numbers. Raises NonFiniteError naming the stage otherwise."""
        if torch.isfinite(values).all():
            return values
        half = self.dtype == torch.float16
        way_out = "load the model with dtype float32 or bfloat16" if half else "check the weights and the latents"
        raise NonFiniteError(f"{stage} holds NaN or infinite numbers in {str(self.dtype)[6:]}: {way_out}")
