"""The parts of a pipeline as diffusers and transformers show them: their configs, calls and results.

A `Part` holds no weights of its own: it shows the modules, parameters and buffers of one of ldm2's, under the same
names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm2.checkpoints.writer import write_safetensors
from ldm2.conditioning import Conditioning
from ldm2.runtime.compilation import check_compiler, compile_step
from ldm2.vae import Posterior


class Config(dict):
    """Fields by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no field {name!r}") from None


class Output(dict):
    """Results by attribute, by key, or by their place."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"the result has no {name!r}, it has {', '.join(self)}") from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The values in their order."""
        return tuple(self.values())


class AudioPipelineOutput(Output):
    """audios: (B, N) numpy or tensor, or latents (B, C, T/4, F/4) for output_type "latent"."""

    def __init__(self, audios: Any):
        super().__init__(audios=audios)


class Part(nn.Module):
    """A module of ldm2 behind the face of another class.

    module: what computes; config: the fields of its config.json; stage: in which its weights are in memory.
    """

    file = "diffusion_pytorch_model"                       # in which its weights are saved

    def __init__(self, module: nn.Module, config: Mapping[str, Any], stage: AbstractContextManager):
        super().__init__()
        vars(self).update(module=module, config=Config(config), stage=stage)
        vars(self).update({name: vars(module)[name] for name in ("_modules", "_parameters", "_buffers")})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the part's first parameter."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the part's first parameter."""
        return next(self.parameters()).device

    def to(self, *arguments: Any, **named: Any) -> Part:
        """Nothing but what is so already, and any memory_format, which has no effect: parts move with the pipeline."""
        if set(named) - {"memory_format"} or arguments:
            super().to(*arguments, **{name: value for name, value in named.items() if name != "memory_format"})
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        own = next(self.parameters())
        moved = fn(own[:0].detach() if own.dim() else own.detach())
        if (moved.dtype, moved.device) != (own.dtype, own.device):
            raise ValueError(f"a part moves with its pipeline: call pipe.to({moved.device.type!r}, {moved.dtype})")
        return self

    def compile(self, *_: Any, **__: Any) -> None:
        """Accepted; of the parts only the UNet is compiled."""

    def save_pretrained(
        self, save_directory: str | PathLike, safe_serialization: bool = True, variant: str | None = None, **_: Any
    ) -> None:
        """Write config.json and the weights as they are now, as safetensors."""
        check_safe(safe_serialization)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(self.config), indent=2) + "\n", encoding="utf-8")
        self.save_weights(folder, variant)

    def save_weights(self, folder: Path, variant: str | None = None) -> None:
        """Write the weights as they are now into a folder that exists."""
        infix = f".{variant}" if variant else ""
        with self.stage:
            write_safetensors(folder / f"{self.file}{infix}.safetensors", self.state_dict())

    def take(self, other: nn.Module) -> None:
        """Load the weights of another module of the same structure. Raises ValueError if it has another."""
        try:
            with torch.no_grad():
                self.load_state_dict({name: value.to(self.device) for name, value in other.state_dict().items()})
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            kind = type(other).__name__
            raise ValueError(f"{kind} does not have the structure of this checkpoint: {reason}") from None


class UNetPart(Part):
    """AudioLDM2UNet2DConditionModel."""

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None, timestep_cond: None = None, attention_mask: None = None,
        cross_attention_kwargs: Mapping | None = None, encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True, encoder_hidden_states_1: Tensor | None = None,
        encoder_attention_mask_1: Tensor | None = None,
    ) -> Output | tuple[Tensor]:
        """x_t (B, C, T, F) with GPT-2's vectors and T5's states (B, L, D) -> what the model predicts, in `sample`."""
        for name, value in (("timestep_cond", timestep_cond), ("attention_mask", attention_mask),
                            ("cross_attention_kwargs", cross_attention_kwargs)):
            if value is not None and value != {}:
                raise ValueError(f"{name} is not supported: leave it out")
        given = [(encoder_hidden_states, encoder_attention_mask), (encoder_hidden_states_1, encoder_attention_mask_1)]
        used = given[: len(self.module.config.context_widths)]
        conditioning = Conditioning(tuple(states for states, _ in used), tuple(mask for _, mask in used), class_labels)
        with self.stage:
            return _result(return_dict, sample=self.module(sample, timestep, conditioning))

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile its step, as ldm2 does it, whatever the mode. Raises ValueError without a compiler."""
        check_compiler(self.device)
        compile_step(self.module)


class Distribution(Posterior):
    """A Posterior with what diffusers shows besides."""

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)


class VAEPart(Part):
    """AutoencoderKL. Rows are decoded one by one and long sounds in tiles anyway."""

    def encode(self, x: Tensor, return_dict: bool = True) -> Output | tuple[Distribution]:
        """Log-mel (B, 1, T, F) -> the distribution of unscaled latents, in `latent_dist`."""
        with self.stage:
            posterior = self.module.encode(x)
        return _result(return_dict, latent_dist=Distribution(posterior.mean, posterior.logvar))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Output | tuple[Tensor]:
        """Unscaled latents (B, C, T, F) -> log-mel (B, 1, 4 T, 4 F), in `sample`."""
        with self.stage:
            return _result(return_dict, sample=self.module.decode(z))

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Output | tuple[Tensor]:
        """Log-mel there and back, by the mean of the distribution or a draw from it."""
        latents = self.encode(sample).latent_dist
        return self.decode(latents.sample(generator) if sample_posterior else latents.mode(), return_dict)

    def enable_slicing(self) -> None:
        """Accepted: rows are decoded one by one anyway."""

    def enable_tiling(self, *_: Any) -> None:
        """Accepted: the pipeline decodes as diffusers does, in one piece."""

    disable_slicing, disable_tiling = enable_slicing, enable_tiling


class VocoderPart(Part):
    """SpeechT5HifiGan."""

    file = "model"

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Log-mel (T, F) or (B, T, F) -> waveform (N,) or (B, N)."""
        with self.stage:
            return self.module(spectrogram) if spectrogram.dim() > 2 else self.module(spectrogram[None])[0]


class ProjectionPart(Part):
    """AudioLDM2ProjectionModel."""

    def forward(
        self, hidden_states: Tensor, hidden_states_1: Tensor, attention_mask: Tensor | None = None,
        attention_mask_1: Tensor | None = None,
    ) -> Output:
        """CLAP's vectors (B, 1, D0) and text states (B, L, D1) -> the sequence (B, L + 5, D) for GPT-2 and its mask."""
        mask = torch.ones(hidden_states_1.shape[:2], device=hidden_states_1.device)
        mask = mask if attention_mask_1 is None else attention_mask_1
        with self.stage:
            sequence, kept = self.module(hidden_states[:, 0], hidden_states_1, mask.bool())
        return Output(hidden_states=sequence, attention_mask=kept.long())


class ClapPart(Part):
    """The text branch of ClapModel. Its audio branch is read when the pipeline ranks."""

    file = "model"

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Output:
        """Token ids and mask (B, L) -> unit vectors (B, D), in `pooler_output`."""
        with self.stage:
            states = self.module.text_model(input_ids=input_ids, attention_mask=attention_mask)
            vectors = self.module.text_projection(states.pooler_output)
        vectors = nn.functional.normalize(vectors, dim=-1)
        return Output(last_hidden_state=states.last_hidden_state, pooler_output=vectors)

    def get_audio_features(self, *_: Any, **__: Any) -> None:
        """Raises ValueError naming what to call instead."""
        raise ValueError("CLAP's audio branch is read for ranking only: call pipe.score_waveforms, or take "
                         "transformers.ClapModel")

    forward = get_audio_features


def _result(return_dict: bool, **values: Any) -> Output | tuple:
    return Output(values) if return_dict else tuple(values.values())


def check_safe(safe_serialization: bool) -> None:
    """Raises ValueError for pickles."""
    if not safe_serialization:
        raise ValueError(f"safe_serialization must be True, weights are safetensors, got {safe_serialization!r}")
