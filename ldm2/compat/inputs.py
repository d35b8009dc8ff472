"""The arguments of one call, checked before anything is computed, and what the text side makes of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm2 import samplers
from ldm2.compat import schedulers
from ldm2.compat.components import Components
from ldm2.compat.noise import GeneratorNoise, Generators
from ldm2.conditioning import Conditioning
from ldm2.options import check_integer, check_number
from ldm2.schedules import Schedule
from ldm2.stages import Callback
from ldm2.text.encoder import TextEncoder

OUTPUT_TYPES = ("np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """Arguments of `AudioLDM2Pipeline.__call__` by their names."""

    prompt: str | list[str] | None = None
    transcription: str | list[str] | None = None
    audio_length_in_s: float | None = None
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    negative_prompt: str | list[str] | None = None
    num_waveforms_per_prompt: int = 1
    eta: float = 0.0
    generator: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    generated_prompt_embeds: Tensor | None = None
    negative_generated_prompt_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    negative_attention_mask: Tensor | None = None
    max_new_tokens: int | None = None
    callback: Callable[[int, int, Tensor], object] | None = None
    callback_steps: int = 1
    cross_attention_kwargs: dict | None = None
    output_type: str = "np"

    @classmethod
    def of(cls, arguments: Mapping[str, object]) -> Request:
        """One of those of the arguments that it has."""
        return cls(**{name: value for name, value in arguments.items() if name in cls.__dataclass_fields__})

    @property
    def guided(self) -> bool:
        """Whether there is a negative side."""
        return self.guidance_scale > 1

    @property
    def prompts(self) -> list[str] | None:
        """The prompts, None where embeddings stand for them."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def rows(self) -> int:
        """Prompts times waveforms."""
        count = len(self.prompt_embeds) if self.prompts is None else len(self.prompts)
        return count * self.num_waveforms_per_prompt

    def check(self, pipe: Components) -> tuple[int, int]:
        """Mel frames and samples of the sound. Raises ValueError naming value and rule for what is impossible."""
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {self.output_type!r}, choose from {', '.join(OUTPUT_TYPES)}")
        if self.cross_attention_kwargs:
            raise ValueError(f"cross_attention_kwargs is not supported, got {self.cross_attention_kwargs!r}")
        check_integer("num_waveforms_per_prompt", self.num_waveforms_per_prompt)
        check_integer("callback_steps", self.callback_steps)
        check_number("guidance_scale", self.guidance_scale)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens)
        if self.callback is not None and not callable(self.callback):
            raise ValueError(f"callback must be callable, got {self.callback!r}")
        eta = self.eta if pipe._sampler == "ddim" else 0.0
        samplers.check_settings(pipe._sampler, self.num_inference_steps, eta, pipe._schedule)
        self._check_texts(pipe._model.text)
        self._check_embeddings()
        self._check_latents(pipe)
        return self._length(pipe)

    def _check_texts(self, text: TextEncoder) -> None:
        if self.prompt is not None and not isinstance(self.prompt, (str, list)):
            raise ValueError(f"prompt must be a string or a list of strings, got {type(self.prompt).__name__}")
        if self.prompt == []:
            raise ValueError("the list of prompts is empty")
        for name in ("transcription", "negative_prompt"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, list)):
                raise ValueError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
            if isinstance(value, list) and self.prompts is not None and len(value) != len(self.prompts):
                raise ValueError(f"{len(value)} texts for {name} and {len(self.prompts)} prompts: give one for each")
        if text.is_speech_model and self.transcription is None and self.prompt is not None:
            raise ValueError("this is a speech model: it needs a transcription")

    def _check_embeddings(self) -> None:
        for side in ("", "negative_"):
            given = getattr(self, f"{side}prompt_embeds"), getattr(self, f"{side}generated_prompt_embeds")
            mask = getattr(self, f"{side}attention_mask")
            if getattr(self, f"{side}prompt") is not None and given[0] is not None:
                raise ValueError(f"give either {side}prompt or {side}prompt_embeds, not both")
            if given[0] is not None and given[1] is None:
                raise ValueError(f"{side}prompt_embeds needs {side}generated_prompt_embeds beside it")
            if given[0] is not None and mask is not None and mask.shape != given[0].shape[:2]:
                raise ValueError(f"{side}attention_mask must be {tuple(given[0].shape[:2])} as {side}prompt_embeds, "
                                 f"got {tuple(mask.shape)}")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("give either prompt, or prompt_embeds and generated_prompt_embeds")
        for name in ("prompt_embeds", "generated_prompt_embeds"):
            positive, negative = getattr(self, name), getattr(self, f"negative_{name}")
            if positive is not None and negative is not None and positive.shape != negative.shape:
                shapes = f"{tuple(positive.shape)} and {tuple(negative.shape)}"
                raise ValueError(f"{name} and negative_{name} must have the same shape, got {shapes}")

    def _check_latents(self, pipe: Components) -> None:
        GeneratorNoise(self.generator, self.rows, pipe.dtype)
        if self.latents is None:
            return
        channels, _, bins = pipe._model.latent_shape_for_frames(1)
        shape = tuple(self.latents.shape) if isinstance(self.latents, Tensor) else type(self.latents).__name__
        if not isinstance(shape, tuple) or len(shape) != 4 or (*shape[:2], shape[3]) != (self.rows, channels, bins):
            raise ValueError(f"latents must be ({self.rows}, {channels}, frames, {bins}), got {shape}")

    def _length(self, pipe: Components) -> tuple[int, int]:
        """Seconds -> mel frames and samples, with diffusers' rounding."""
        config, factor = pipe._model.vocoder.config, pipe.vae_scale_factor
        frame, seconds = config.hop_length / config.sample_rate, self.audio_length_in_s
        if seconds is None:
            trained = pipe._model.unet.config.sample_size
            if trained is None:
                raise ValueError("audio_length_in_s is needed: the checkpoint's UNet config has no sample_size")
            seconds = trained * factor * frame
        least = factor * frame
        if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real) or not least <= seconds < math.inf:
            raise ValueError(f"audio_length_in_s must be at least {least} and finite, got {seconds!r}")
        return math.ceil(int(seconds / frame) / factor) * factor, int(seconds * config.sample_rate)

    def conditionings(
        self, text: TextEncoder, device: torch.device, dtype: torch.dtype
    ) -> tuple[Conditioning, Conditioning | None]:
        """Prompted and unconditional side of guidance, a row for each prompt, from texts or from embeddings."""
        def given(side: str) -> Conditioning | None:
            states = getattr(self, f"{side}prompt_embeds")
            vectors, mask = getattr(self, f"{side}generated_prompt_embeds"), getattr(self, f"{side}attention_mask")
            if states is None:
                return None
            contexts, masks = ((vectors,), (None,)) if text.is_speech_model else ((vectors, states), (None, mask))
            return Conditioning(contexts, masks).to(device, dtype)

        conditioning = given("")
        if conditioning is None:
            conditioning = text.encode(
                self.prompts, transcription=self.transcription, num_vectors=self.max_new_tokens
            )
        if not self.guided:
            return conditioning, None
        unconditional = given("negative_")
        if unconditional is None:
            unconditional = text.encode_unconditional(
                conditioning, self.negative_prompt, transcription=self.transcription
            )
        return conditioning, unconditional

    def speech(self, text: TextEncoder, negative: bool) -> tuple[Tensor, Tensor]:
        """States and mask of the phonemes of a speech model, a row for each waveform; zeros for the negative side."""
        if self.prompt_embeds is not None:
            states, mask = self.prompt_embeds, self.attention_mask
            mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
        else:
            words = self.transcription
            words = words if isinstance(words, list) else [words] * len(self.prompts)
            states, mask = text.phonemes([text.phonemes.phonemize(each) for each in words])
        states, mask = (part.repeat_interleave(self.num_waveforms_per_prompt, dim=0) for part in (states, mask))
        if negative:
            states, mask = (torch.cat([torch.zeros_like(part), part]) for part in (states, mask))
        return states, mask

    def after_step(self, sampler: str, schedule: Schedule) -> Callback | None:
        """diffusers' callback(step, timestep, latents) as one of ours; it counts calls of the model."""
        if self.callback is None:
            return None
        visited, ends = schedulers.calls(sampler, samplers.timesteps(sampler, schedule, self.num_inference_steps))
        order = 2 if sampler == "heun" else 1

        def after_step(done: int, total: int, latents: Tensor) -> None:
            end = ends[done - 1]
            if end % self.callback_steps == 0:
                self.callback(end // order, visited[end], latents)

        return after_step
