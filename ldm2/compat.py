"""A drop-in for `diffusers.AudioLDM2Pipeline`: the same arguments, the same `.audios`.

    from ldm2.compat import AudioLDM2Pipeline          # was: from diffusers import AudioLDM2Pipeline

The same generator gives the same audio as diffusers; `reference` is "diffusers" unless it is said otherwise. As there,
candidates (num_waveforms_per_prompt > 1) come back in the order they were made unless librosa is installed; where it
is, they are ranked, but each prompt's apart from the others'.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm2 import loading, samplers, stages
from ldm2.checkpoints import hub
from ldm2.conditioning import Conditioning
from ldm2.runtime.device import choose_device, choose_dtype
from ldm2.runtime.inference import inference
from ldm2.schedules import Schedule
from ldm2.settings import Sampling
from ldm2.text.encoder import TextEncoder

# The scheduler classes of diffusers and the samplers that compute the same.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "UniPCMultistepScheduler": "unipc",
}
OUTPUT_TYPES = ("np", "pt", "latent")
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class AudioPipelineOutput:
    """audios: (B, N) numpy or tensor, or latents (B, C, T/4, F/4) for output_type "latent"."""

    audios: np.ndarray | Tensor


@dataclass(frozen=True)
class Scheduler:
    """What `pipe.scheduler` shows: the config for `SomeScheduler.from_config(pipe.scheduler.config)`."""

    config: dict


class AudioLDM2Pipeline:
    """diffusers' pipeline by its arguments, ldm2 by its arithmetic. Built by `from_pretrained`."""

    def __init__(self, folder: Path, reference: str, dtype: torch.dtype):
        self._folder, self._reference = folder, reference
        self._progress = True
        self._model = loading.load(
            folder, reference=reference, device="cpu", dtype=str(dtype).removeprefix("torch.")
        )
        self._sample_size = _read(folder / "unet/config.json").get("sample_size")
        self.scheduler = Scheduler(_read(folder / "scheduler/scheduler_config.json"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, torch_dtype: torch.dtype = torch.float32, *,
        dtype: torch.dtype | None = None, revision: str | None = None, local_files_only: bool = False,
        reference: str = "diffusers",
    ) -> AudioLDM2Pipeline:
        """A hub name or a folder -> the pipeline on the CPU; `dtype` is the newer word for `torch_dtype`."""
        name = str(pretrained_model_name_or_path)
        folder = hub.resolve(name, revision=revision, local_files_only=local_files_only)
        return cls(folder, reference, torch_dtype if dtype is None else dtype)

    @property
    def unet(self):
        """The denoiser, an nn.Module of ldm2."""
        return self._model.unet

    @property
    def vae(self):
        """The autoencoder, an nn.Module of ldm2."""
        return self._model.vae

    @property
    def vocoder(self):
        """The vocoder, an nn.Module of ldm2."""
        return self._model.vocoder

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet, the VAE and the vocoder."""
        return self._model.dtype

    @property
    def scheduler(self) -> Scheduler:
        """The noise schedule; assign a scheduler of diffusers to change sampler or schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value) -> None:
        config = dict(value.config)
        name = config.get("_class_name") if isinstance(value, Scheduler) else type(value).__name__
        if name not in SAMPLERS:
            raise ValueError(f"unknown scheduler {name!r}, choose from {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[name]
        if name == "DPMSolverMultistepScheduler" and config.get("algorithm_type") == "sde-dpmsolver++":
            sampler = "dpmpp-2m-sde"
        self._model.schedule = Schedule.from_dict(config | {"_class_name": name})
        self._scheduler, self._sampler = value, sampler

    def to(
        self, *targets: str | torch.device | torch.dtype, device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> AudioLDM2Pipeline:
        """Move to a device, to a dtype, or both, with the weights as they are now. Returns self.

        The text encoders are read again for another dtype: which of their matrices stay float32 depends on it.
        """
        model = self._model
        for target in targets:
            device, dtype = (device, target) if isinstance(target, torch.dtype) else (target, dtype)
        device = model.device if device is None else choose_device(str(device))
        dtype = model.dtype if dtype is None else choose_dtype(str(dtype).removeprefix("torch."), device)
        if dtype != model.dtype:
            text = TextEncoder.from_folder(self._folder, reference=self._reference, device=device, dtype=dtype)
            model.move(device, dtype, text)
        elif device != model.device:
            model.move(device, dtype, model.text.to(device))
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Show the progress bar or not."""
        self._progress = not disable

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        transcription: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int = 200,
        guidance_scale: float = 3.5,
        negative_prompt: str | list[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        generated_prompt_embeds: Tensor | None = None,
        negative_generated_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], object] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "np",
    ) -> AudioPipelineOutput | tuple:
        """Sound, by the arguments of diffusers' pipeline.

        audio_length_in_s defaults to 10.24 (what the UNet was trained on); `generator` draws the noise, one for the
        batch or a list with one for each waveform. Embeddings are those that `encode_prompt` returns for one side:
        prompt_embeds (B, L, 1024) of T5 with attention_mask (B, L), generated_prompt_embeds (B, 8, 768) of GPT-2.
        callback(step, timestep, latents) is called every `callback_steps` steps. Raises ValueError for what diffusers
        refuses, naming value and rule.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}, choose from {', '.join(OUTPUT_TYPES)}")
        if cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs is not supported, got {cross_attention_kwargs!r}")
        num_frames, num_samples = self._length(audio_length_in_s)
        conditioning, unconditional = self._conditionings(
            prompt, transcription, guidance_scale > 1, negative_prompt, max_new_tokens,
            (generated_prompt_embeds, prompt_embeds, attention_mask),
            (negative_generated_prompt_embeds, negative_prompt_embeds, negative_attention_mask),
        )
        conditioning = conditioning.repeat(num_waveforms_per_prompt)
        if unconditional is not None:
            unconditional = unconditional.repeat(num_waveforms_per_prompt)
        noise = GeneratorNoise(generator, conditioning.batch_size, self.dtype)
        if latents is None:
            latents = noise.draw(conditioning.batch_size, *self._model.latent_shape_of(num_frames))
        latents = self._model.denoise(
            conditioning, unconditional, latents, self._sampling(num_inference_steps, guidance_scale, eta), noise=noise,
            callback=callback and self._after_step(callback, callback_steps, num_inference_steps),
            progress=self._progress,
        )
        if output_type == "latent":
            return AudioPipelineOutput(latents)
        audios = self._model.vocode(self._model.decode(latents, tile=latents.shape[2]))[:, :num_samples]
        if num_waveforms_per_prompt > 1 and prompt is not None and importlib.util.find_spec("librosa"):
            prompts = [prompt] if isinstance(prompt, str) else prompt
            audios = audios[self._model.rank(audios.numpy(), prompts)[0]]
        if output_type == "np":
            audios = audios.numpy()
        return AudioPipelineOutput(audios) if return_dict else (audios,)

    def _sampling(self, steps: int, guidance_scale: float, eta: float) -> Sampling:
        """How diffusers' pipeline would sample: eta counts for DDIM alone."""
        return Sampling(steps=steps, guidance_scale=guidance_scale, sampler=self._sampler,
                        eta=eta if self._sampler == "ddim" else 0.0)

    def encode_prompt(
        self, prompt: str | list[str], device: str | torch.device | None = None, num_waveforms_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False, transcription: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None, max_new_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T5 states (B, L, 1024), their mask (B, L) and GPT-2's vectors (B, 8, 768); the negative rows come first."""
        sides = self._conditionings(prompt, transcription, do_classifier_free_guidance, negative_prompt, max_new_tokens)
        sides = [side.repeat(num_waveforms_per_prompt) for side in reversed(sides) if side is not None]
        both = Conditioning.join(sides).to(self.device if device is None else device)
        generated, states = both.contexts
        mask = both.masks[1]
        mask = torch.ones(states.shape[:2], dtype=torch.long, device="cpu") if mask is None else mask.long()
        return states, mask, generated

    @inference
    def _conditionings(
        self, prompt, transcription, guided: bool, negative_prompt, num_vectors: int | None,
        given: tuple = (None, None, None), negative_given: tuple = (None, None, None),
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance, from texts or from embeddings (GPT-2's, T5's, T5's mask)."""
        for name, text, embeddings in (("prompt", prompt, given), ("negative_prompt", negative_prompt, negative_given)):
            if text is not None and embeddings[1] is not None:
                raise ValueError(f"give either {name} or {name}_embeds, not both")
            if embeddings[1] is not None and embeddings[0] is None:
                raise ValueError(f"{name}_embeds needs generated embeddings beside it")
        if prompt is None and given[1] is None:
            raise ValueError("give either prompt, or prompt_embeds and generated_prompt_embeds")
        text = self._model.text
        if given[1] is not None:
            conditioning = self._from_embeddings(*given)
        else:
            conditioning = text.encode(prompt, transcription=transcription, num_vectors=num_vectors)
        if not guided:
            return conditioning, None
        if negative_given[1] is not None:
            return conditioning, self._from_embeddings(*negative_given)
        return conditioning, text.encode_unconditional(conditioning, negative_prompt, transcription=transcription)

    def _from_embeddings(self, generated: Tensor, states: Tensor, mask: Tensor | None) -> Conditioning:
        if self._model.text.speaks:
            return Conditioning((generated,), (None,)).to(self.device, self.dtype)
        return Conditioning((generated, states), (None, mask)).to(self.device, self.dtype)

    def _length(self, seconds: float | None) -> tuple[int, int]:
        """Seconds -> mel frames and samples, with diffusers' rounding."""
        config, factor = self.vocoder.config, self.vae.config.downsampling
        frame = config.hop_length / config.sample_rate
        if seconds is None:
            if self._sample_size is None:
                raise ValueError("audio_length_in_s is needed: the checkpoint's UNet config has no sample_size")
            seconds = self._sample_size * factor * frame
        if not factor * frame <= seconds < math.inf:
            raise ValueError(f"audio_length_in_s must be at least {factor * frame} and finite, got {seconds}")
        return math.ceil(int(seconds / frame) / factor) * factor, int(seconds * config.sample_rate)

    def _after_step(self, callback: Callable, every: int, steps: int) -> stages.Callback:
        """diffusers' callback(step, timestep, latents) as one of ours."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"callback_steps must be a whole number from 1 up, got {every!r}")
        timesteps = samplers.timesteps(self._sampler, self._model.schedule, steps)

        def after_step(done: int, total: int, latents: Tensor) -> None:
            if (done - 1) % every == 0:
                callback(done - 1, timesteps[done - 1], latents)

        return after_step


class GeneratorNoise:
    """Noise as diffusers draws it: in the model's dtype, from one generator for the batch or one for each row."""

    def __init__(self, generator: Generators, rows: int, dtype: torch.dtype):
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} waveforms: give one, or one for each")
        self.generator, self.dtype = generator, dtype

    def draw(self, rows: int, *shape: int) -> Tensor:
        """(rows, *shape) in the model's dtype, where the generator lives."""
        if isinstance(self.generator, list):
            return torch.cat([self._draw(generator, 1, *shape) for generator in self.generator])
        return self._draw(self.generator, rows, *shape)

    def _draw(self, generator: torch.Generator | None, *shape: int) -> Tensor:
        device = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=device)

    def __call__(self, like: Tensor) -> Tensor:
        return self.draw(*like.shape).to(like)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
