"""The class AudioLDM2Pipeline: diffusers' pipeline by its arguments, ldm2 by its arithmetic."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from os import PathLike

import torch
from torch import Tensor

from ldm2.checkpoints import hub
from ldm2.compat import arguments, saving
from ldm2.compat.components import NAMES
from ldm2.compat.inputs import Request
from ldm2.compat.loras import WithLoras
from ldm2.compat.noise import GeneratorNoise, Generators
from ldm2.compat.parts import AudioPipelineOutput
from ldm2.conditioning import Conditioning
from ldm2.runtime.inference import inference
from ldm2.settings import Sampling
from ldm2.text.gpt2 import generate_vectors

logger = logging.getLogger(__name__)


class AudioLDM2Pipeline(WithLoras):
    """A checkpoint as diffusers' pipeline shows it. Built by `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, torch_dtype: torch.dtype | str | Mapping | None = None, *,
        dtype: torch.dtype | str | Mapping | None = None, revision: str | None = None,
        local_files_only: bool | None = False, variant: str | None = None, cache_dir: str | PathLike | None = None,
        token: str | bool | None = None, device_map: object = None, reference: str = "diffusers", **more: object,
    ) -> AudioLDM2Pipeline:
        """A hub name or a folder -> the pipeline on the CPU, or where device_map says.

        dtype is the newer word for torch_dtype. `scheduler=` and other parts by their names take the place of the
        checkpoint's own. Of diffusers' further arguments docs/diffusers.md says which have no effect and which are
        refused. Raises ValueError or OSError, one line.
        """
        parts = {name: more.pop(name) for name in NAMES if more.get(name) is not None}
        arguments.check(more)
        place, kind = arguments.device_of(device_map), arguments.dtype_of(torch_dtype, dtype)
        name = str(pretrained_model_name_or_path)
        folder = hub.resolve(
            name, revision, bool(local_files_only), cache_dir=cache_dir, token=token, variant=variant
        )
        if folder.is_file():
            raise ValueError(f"{folder} is a file of the authors: load it with ldm2.load, or write a folder of it with "
                             "`ldm2 convert`")
        pipe = cls(folder, reference=reference, dtype=kind, device=place, variant=variant, name=name)
        for part, value in parts.items():
            setattr(pipe, part, value)
        return pipe

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

        audio_length_in_s defaults to what the UNet was trained on (10.24); `generator` draws the noise, one for the
        batch or a list with one for each waveform. Embeddings are those that `encode_prompt` returns for one side:
        prompt_embeds (B, L, 1024) of T5 with attention_mask (B, L), generated_prompt_embeds (B, 8, 768) of GPT-2.
        callback(step, timestep, latents) is called every `callback_steps` steps. Raises ValueError before anything is
        computed for what is impossible, naming value and rule.
        """
        asked = Request.of(locals())
        num_frames, num_samples = asked.check(self)
        conditioning, unconditional = self._conditionings(asked)
        noise = GeneratorNoise(generator, conditioning.batch_size, self.dtype)
        if latents is None:
            latents = noise.draw(conditioning.batch_size, *self._model.latent_shape_for_frames(num_frames))
        latents = self._denoise(asked, conditioning, unconditional, latents, noise)
        if output_type == "latent":
            return AudioPipelineOutput(latents)
        audios = self._model.vocode(self._model.decode(latents, tile=latents.shape[2]))[:, :num_samples]
        if num_waveforms_per_prompt > 1 and prompt is not None:
            audios = self.score_waveforms(prompt, audios, num_waveforms_per_prompt)
        audios = audios.numpy() if output_type == "np" else audios
        return AudioPipelineOutput(audios) if return_dict else (audios,)

    def _denoise(
        self, asked: Request, conditioning: Conditioning, unconditional: Conditioning | None, latents: Tensor,
        noise: GeneratorNoise,
    ) -> Tensor:
        """The one call of the model's sampling."""
        sampling = Sampling(
            steps=asked.num_inference_steps, guidance_scale=asked.guidance_scale, sampler=self._sampler,
            eta=asked.eta if self._sampler == "ddim" else 0.0, spacing=self._schedule.timestep_spacing,
        )
        return self._model.denoise(
            conditioning, unconditional, latents, sampling, noise=noise, schedule=self._schedule,
            callback=asked.after_step(self._sampler, self._schedule), progress=not self._bar.get("disable"),
        )

    @inference
    def encode_prompt(
        self, prompt: str | list[str] | None = None, device: str | torch.device | None = None,
        num_waveforms_per_prompt: int = 1, do_classifier_free_guidance: bool = False,
        transcription: str | list[str] | None = None, negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        generated_prompt_embeds: Tensor | None = None, negative_generated_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None, negative_attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T5 states (B, L, 1024), their mask (B, L) and GPT-2's vectors (B, 8, 768); the negative rows come first.

        In the speech models the states are those of the phonemes, which are zeros on the negative side.
        """
        asked = Request.of(locals() | {"guidance_scale": 2.0 if do_classifier_free_guidance else 1.0})
        asked.check(self)
        with self._model.stages["text"]:
            sides = [side for side in reversed(self._conditionings(asked)) if side is not None]
            both = Conditioning.join(sides)
            if self._model.text.is_speech_model:
                states, mask = asked.speech(self._model.text, negative=len(sides) > 1)
            else:
                states, mask = both.contexts[1], both.masks[1]
        mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
        device = self.device if device is None else device
        return states.to(device, self.dtype), mask.long().to(device), both.contexts[0].to(device, self.dtype)

    @inference
    def _conditionings(self, asked: Request) -> tuple[Conditioning, Conditioning | None]:
        """The conditional and the unconditional side of guidance, a row for each waveform."""
        with self._model.stages["text"]:
            sides = asked.conditionings(self._model.text, self.device, self.dtype)
        repeated = (side and side.repeat(asked.num_waveforms_per_prompt) for side in sides)
        return tuple(repeated)

    @inference
    def generate_language_model(
        self, inputs_embeds: Tensor, max_new_tokens: int | None = 8, attention_mask: Tensor | None = None, **_: object
    ) -> Tensor:
        """A sequence (B, L, D) with its mask (B, L) -> the max_new_tokens vectors with which GPT-2 continues it."""
        text = self._model.text
        device = inputs_embeds.device
        mask = torch.ones(inputs_embeds.shape[:2], device=device) if attention_mask is None else attention_mask
        number = text.num_vectors if max_new_tokens is None else max_new_tokens
        with self._model.stages["text"]:
            return generate_vectors(text.gpt2, inputs_embeds, mask.bool().to(device), number)

    def prepare_latents(
        self, batch_size: int, num_channels_latents: int, height: int, dtype: torch.dtype,
        device: str | torch.device, generator: Generators, latents: Tensor | None = None,
    ) -> Tensor:
        """Noise (B, C, height / 4, bins / 4) times what the scheduler begins with; `__call__` takes it without that."""
        factor = self.vae_scale_factor
        shape = num_channels_latents, int(height) // factor, self.vocoder.config.model_in_dim // factor
        if latents is None:
            latents = GeneratorNoise(generator, batch_size, dtype).draw(batch_size, *shape)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, object]:
        """What diffusers hands to the steps of this scheduler."""
        draws = self._sampler in ("ddim", "ddpm", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-sde", "lcm")
        return ({"eta": eta} if self._sampler == "ddim" else {}) | ({"generator": generator} if draws else {})

    def check_inputs(
        self, prompt: str | list[str] | None, audio_length_in_s: float, vocoder_upsample_factor: float,
        callback_steps: int, transcription: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, generated_prompt_embeds: Tensor | None = None,
        negative_generated_prompt_embeds: Tensor | None = None, attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
    ) -> None:
        """The checks that `__call__` begins with. Raises ValueError naming value and rule."""
        Request.of(locals()).check(self)

    @inference
    def mel_spectrogram_to_waveform(self, mel_spectrogram: Tensor) -> Tensor:
        """Log-mel (B, 1, T, F) or (B, T, F) -> waveform (B, N), float32 on the CPU."""
        return self.vocoder(mel_spectrogram).cpu().float()

    def score_waveforms(
        self, text: str | list[str], audio: Tensor, num_waveforms_per_prompt: int,
        device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Waveforms (P * n, N), those of each prompt best first by CLAP's similarity; as they are without librosa.

        They are left as they are, too, where the checkpoint cannot rank.
        """
        if not importlib.util.find_spec("librosa"):
            return audio
        try:
            return audio[self._model.rank(audio.numpy(), [text] if isinstance(text, str) else text)[0]]
        except (ValueError, OSError) as error:
            logger.warning("the sounds are not ranked: %s", error)
            return audio

    def save_pretrained(
        self, save_directory: str | PathLike, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str | None = None, push_to_hub: bool = False, **_: object,
    ) -> None:
        """Write a folder that ldm2 and diffusers read: the weights as they are now, in this dtype, and the scheduler.

        The text encoders are those of the files that were read. Raises ValueError for pickles and for uploads.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported: save into a folder and call `hf upload`")
        saving.check_safe(safe_serialization)
        saving.save(self, save_directory, variant)
