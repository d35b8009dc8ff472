"""The stages of a generation, each a method that takes tensors and returns tensors, on one device in one precision.

prompts -> Conditioning (text) -> latents (UNet and sampler) -> log-mel (VAE) -> waveform (HiFi-GAN), and from a sound
back to its latents. What strings them together is in `ldm2.pipeline` and `ldm2.edit`.

Reference: "AudioLDM 2: Learning Holistic Audio Generation with Self-supervised Pretraining", arXiv:2308.05734.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm2 import audio, samplers, tiling
from ldm2.conditioning import Conditioning
from ldm2.guidance import Guidance
from ldm2.mel import MelConfig, config_for, log_mel
from ldm2.noise import SeededNoise
from ldm2.runtime import graphs
from ldm2.runtime.deepcache import reusing
from ldm2.runtime.device import dtype_name
from ldm2.runtime.host import usual_numpy
from ldm2.runtime.inference import inference, ordinary
from ldm2.runtime.loaded import Loaded
from ldm2.runtime.memory import in_stage
from ldm2.runtime.progress import Progress, shown
from ldm2.samplers import Step
from ldm2.samplers.core import Denoiser
from ldm2.schedules import Schedule
from ldm2.settings import Sampling, Settings, row_seeds
from ldm2.text.ranking import Ranker, best_first
from ldm2.vae import Posterior
from ldm2.windows import Window, average, plan

logger = logging.getLogger(__name__)

Callback = Callable[[int, int, Tensor], object]

_making_ranker = threading.Lock()                          # one thread makes it, the others wait for it


class NonFiniteError(ArithmeticError):
    """A stage returned NaN or infinite numbers; the message names the stage and the way out."""


@dataclass(frozen=True)
class Init:
    """Where a run of the sampler begins and what it holds fixed: see `samplers.sample`.

    x0:    latents of sound (B, C, T/f, F/f) that a late start begins from. start: the first step to take
    edit:  edit(step) -> the x_t to take the step from
    """

    x0: Tensor | None = None
    start: int = 0
    edit: Callable[[Step], Tensor] | None = None


class Stages(Loaded):
    """What each of the models of a checkpoint does. Built by `ldm2.load`."""

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
        self, conditioning: Conditioning, unconditional: Conditioning | None, latents: Tensor,
        sampling: Sampling = Sampling(), *, noise: Callable[[Tensor], Tensor] | None = None,
        windows: Sequence[Window] | None = None, init: Init = Init(), schedule: Schedule | None = None,
        callback: Callback | None = None, progress: bool | Progress = False,
    ) -> Tensor:
        """Standard normal `latents` (B, C, T/f, F/f) -> latents of sound, same shape, float32.

        conditioning, unconditional: B rows each; the latter is needed for guidance and unused otherwise
        sampling: sampler, steps, guidance and the like; None in it stands for the checkpoint's own values (and for no
                  guidance without an unconditional side)
        noise:    draws what stochastic samplers add: noise(like) -> standard normal
        windows:  what the UNet sees at once (see `windows`), all if None. For prompts over time the conditionings have
                  B rows for the first prompt, then B for the second, and so on.
        init:     a late start from latents of sound, and what is held fixed
        schedule: noise levels and options of the samplers, default the model's own
        callback: called as callback(step, total, latents) after each step; may return False: raises Cancelled
        progress: as of `ldm2.runtime.progress.shown`
        """
        unguided = {"guidance_scale": 1.0} if unconditional is None else {}
        sampling = sampling.resolved(self.defaults | unguided)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be callable, got {callback!r}")
        schedule = (self.schedule if schedule is None else schedule).with_spacing(sampling.spacing)
        guided = functools.partial(
            Guidance, self.unet, scale=sampling.guidance_scale, rescale=sampling.guidance_rescale, dtype=self.dtype,
            timesteps=samplers.timesteps(sampling.sampler, schedule, sampling.steps),
            active_at=lambda t: schedule.within(t, sampling.guidance_interval),
        )
        denoiser: Denoiser
        if windows is None:
            denoiser = guided(conditioning, unconditional).denoiser(self._predictor(sampling.cache_interval))
        else:
            denoiser = self._windowed(guided, windows, conditioning, unconditional, len(latents),
                                      sampling.cache_interval)
        with shown(progress) as report:

            def after_step(done: int, total: int, latents: Tensor) -> object:
                report("denoising", done, total)
                return None if callback is None else callback(done, total, latents)

            report("denoising", 0, sampling.steps - init.start)
            latents = samplers.sample(
                sampling.sampler, denoiser, latents.to(self.device, torch.float32), schedule, sampling.steps,
                eta=sampling.eta, noise=noise, x0=init.x0, start=init.start, edit=init.edit, callback=after_step,
            )
        return self.finite(latents, "the sampler's latents")

    def _predictor(self, cache_interval: int) -> Callable[..., Tensor]:
        """What takes the calls of the UNet in one run of one window: CUDA graphs where they serve, with DeepCache."""
        unet = graphs.accelerated(self.unet)
        return unet if cache_interval == 1 else reusing(unet, cache_interval)

    def _windowed(
        self, guided: Callable[..., Guidance], windows: Sequence[Window], conditioning: Conditioning,
        unconditional: Conditioning | None, rows: int, cache_interval: int,
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
        return average(there, lambda prompts: guidance(prompts).denoiser(self._predictor(cache_interval)), at_once)

    @in_stage("vae")
    @inference
    def decode(
        self, latents: Tensor, *, loop: bool = False, tile: int | None = None, progress: bool | Progress = False
    ) -> Tensor:
        """Latents (B, C, T/f, F/f), scaled as `denoise` returns them -> log-mel (B, 1, T, F) in the model's dtype.

        tile: latent frames to decode at once, default `vae_tile_frames` (reference="diffusers": all of them).
        loop: the end goes on at the start.
        """
        unscaled = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor
        if tile is None:
            tile = latents.shape[2] if self.whole and not loop else self.vae_tile_frames
        tiles = plan(latents.shape[2], tile, tile // 4, loop=loop)
        rows = unscaled.to(self.dtype).split(1)
        with shown(progress) as report:
            after_tile = _counted(report, "decoding", len(rows) * len(tiles))
            mel = torch.cat([tiling.decode(self.vae, row, tiles, after_tile) for row in rows])
        return self.finite(mel, "the VAE's log-mel spectrogram")

    @in_stage("vocoder")
    @inference
    def vocode(self, mel: Tensor, *, loop: bool = False, progress: bool | Progress = False) -> Tensor:
        """Log-mel (B, 1, T, F) -> waveform (B, N), float32 on the CPU; N is at least T * hop_length.

        loop: the end goes on at the start; N is T * hop_length then.
        """
        mel = mel.to(self.device, self.dtype)
        short = mel.shape[2] <= self.native_latent_frames * self.vae.config.downsampling
        chunk = mel.shape[2] if short else tiling.CHUNK_FRAMES
        with shown(progress) as report:
            after_chunk = _counted(report, "vocoding", len(mel) * math.ceil(mel.shape[2] / chunk))
            waveform = torch.cat([tiling.vocode(self.vocoder, row, chunk, loop, after_chunk) for row in mel.split(1)])
        return self.finite(waveform, "the vocoder's waveform")

    @inference
    def log_mel(self, waveforms: np.ndarray) -> Tensor:
        """Waveforms (B, N) at the model's rate -> log-mel (B, 1, T, F), float32 on the model's device.

        T is the least multiple of the VAE's factor that covers N; the sound is continued with silence to fill it.
        """
        missing = -waveforms.shape[-1] % self.samples_per_latent_frame
        padded = torch.from_numpy(np.pad(waveforms, [(0, 0), (0, missing)]))
        return log_mel(padded.to(self.device), self.mel_config)

    @property
    def mel_config(self) -> MelConfig:
        """The front end that belongs to the model's vocoder."""
        vocoder = self.vocoder.config
        return config_for(vocoder.sample_rate, vocoder.hop_length, vocoder.num_mels)

    @usual_numpy
    @in_stage("vae")
    @inference
    def encode_audio(
        self, waveform: np.ndarray | Tensor, sample_rate: int, *, seed: int | Sequence[int] | None = None
    ) -> Tensor:
        """Sound -> latents (B, C, T/f, F/f), float32, scaled as `denoise` returns them and `decode` takes them.

        waveform: (N,) or (B, N) floating point with full scale at -1..1, at any sample_rate (Hz). The level is kept.
        seed:     None takes the mean of the posterior, which is the same each time and nearest to the input. A number s
                  draws from the posterior, as the authors do: row i with seed s + i, or seed[i].

        Raises ValueError for another shape, no samples, integers, NaN or infinite samples, or an impossible rate.
        """
        posterior = self.posterior(waveform, sample_rate)
        latents = posterior.mean
        if seed is not None:
            latents = latents + posterior.std * SeededNoise(row_seeds(seed, len(latents)))(latents)
        return self.finite(latents * self.vae.config.scaling_factor, "the VAE's latents")

    @usual_numpy
    @in_stage("vae")
    @inference
    def posterior(self, waveform: np.ndarray | Tensor, sample_rate: int) -> Posterior:
        """Sound -> the distribution of its latents (B, C, T/f, F/f), float32 and not scaled. Arguments and errors as of
        `encode_audio`."""
        samples = np.atleast_2d(audio.as_samples(waveform))
        rows = audio.resample(samples, audio.check_rate(sample_rate), self.sample_rate)
        mel = self.log_mel(rows).to(self.dtype)
        num_frames = mel.shape[2] // self.vae.config.downsampling
        tile = num_frames if self.whole else self.vae_tile_frames
        tiles = plan(num_frames, tile, tile // 4)
        parts = [tiling.encode(self.vae, row, tiles) for row in mel.split(1)]
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts]))

    @in_stage("text")
    @inference
    def conditionings(self, settings: Settings) -> tuple[Conditioning, Conditioning | None]:
        """The conditional and the unconditional side of guidance, a row for each waveform and prompt over time.

        The second is None without guidance. Without a prompt the unconditional side stands alone.
        """
        if not settings.prompts:
            return self.text.unconditional(settings.candidates), None
        over_time = 1 + len(settings.prompt_at)

        def each(name: str) -> list[str] | None:
            texts = settings.each(name)
            return None if texts is None else texts * over_time

        speech = {"transcription": each("transcription"), "phonemes": each("phonemes")}
        later = [text for _, text in settings.prompt_at for _ in settings.prompts]
        conditioning = self.encode([*settings.prompts, *later], **speech)
        if not settings.guided:
            return conditioning.repeat(settings.candidates), None
        unconditional = self.encode_unconditional(conditioning, each("negative_prompt"), **speech)
        return conditioning.repeat(settings.candidates), unconditional.repeat(settings.candidates)

    def best_first(
        self, waveforms: np.ndarray, settings: Settings, report: Progress
    ) -> tuple[list[int], list[float] | None]:
        """The rows of `waveforms` (rows, N), best first within each prompt, and their CLAP similarities in that order.

        One candidate, or none to compare with a prompt, is not ranked. A ranking that fails costs no sound: the rows
        stay in their order, and a warning says why.
        """
        rows = list(range(len(waveforms)))
        if settings.candidates == 1 or not settings.prompts or not self.can_rank:
            return rows, None
        report("ranking", 0, 1)
        try:
            return self.rank(waveforms, settings.prompts)
        except (ValueError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
            logger.warning("the candidates are in the order of their seeds: ranking failed (%s)", error)
            return rows, None

    @property
    def can_rank(self) -> bool:
        """Whether the checkpoint has CLAP's audio branch, which compares sounds with prompts."""
        return self._make_ranker is not None

    def warn_unranked(self, settings: Settings) -> None:
        """Say before the work that candidates will not be ranked, where the checkpoint cannot."""
        if settings.candidates > 1 and settings.prompts and not self.can_rank:
            logger.warning("this checkpoint has no CLAP audio branch: candidates are in the order of their seeds")

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

    def finite(self, values: Tensor, stage: str) -> Tensor:
        """`values`, if all of them are finite numbers. Raises NonFiniteError naming the stage otherwise."""
        if torch.isfinite(values).all():
            return values
        half = self.dtype == torch.float16
        way_out = "load the model with dtype float32 or bfloat16" if half else "check the weights and the latents"
        raise NonFiniteError(f"{stage} holds NaN or infinite numbers in {dtype_name(self.dtype)}: {way_out}")


def _counted(report: Progress, stage: str, total: int) -> Callable[[], object]:
    """A function to call after each of `total` parts of a stage."""
    counter = iter(range(1, total + 1))
    report(stage, 0, total)
    return lambda: report(stage, next(counter), total)
