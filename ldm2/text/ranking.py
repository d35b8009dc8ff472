"""How well a sound fits a text: cosine of CLAP's audio and text embeddings.

Reference: CLAP, arXiv:2211.06687, section 2.1 (two encoders, one space).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import weights
from ldm2.audio import check_rows, resample
from ldm2.fields import Fields, read_json
from ldm2.runtime import finite
from ldm2.runtime.host import usual_numpy
from ldm2.runtime.inference import inference
from ldm2.text.configs import transformers_config
from ldm2.text.encoders import ClapText, clap_branch
from ldm2.text.tokenizers import from_pretrained

if TYPE_CHECKING:
    import transformers

# A CLAP folder holds both branches; the tables of relative positions are computed, not learned.
CLAP_AUDIO_ONLY = {
    r"(?:text_model|text_projection)\..*": None,
    r"logit_scale_[at]": None,
    r".*\.relative_position_index": None,
}

# Settings of the published checkpoints' feature_extractor, for files that bring none.
FEATURE_EXTRACTOR: dict[str, Any] = {
    "feature_size": 64, "sampling_rate": 48_000, "hop_length": 480, "max_length_s": 10, "fft_window_size": 1024,
    "frequency_min": 50, "frequency_max": 14_000, "truncation": "rand_trunc", "padding": "repeatpad",
}


def check_extractor(path: Path) -> None:
    """Raise ValueError, naming the field, unless a preprocessor_config.json says how CLAP's spectrograms are made."""
    read = Fields(read_json(path), str(path))
    read.check_fixed({
        "feature_extractor_type": ("ClapFeatureExtractor",), "padding": ("repeatpad", "repeat", "pad"),
        "truncation": ("rand_trunc", "fusion"), "padding_value": (0,), "padding_side": ("right",), "top_db": (None,),
        "return_attention_mask": (False,),
    })
    for name in ("feature_size", "hop_length", "sampling_rate", "max_length_s", "fft_window_size", "frequency_max"):
        if name in read.fields:
            read.integer(name)
    lowest = read.get("frequency_min", 0)
    if isinstance(lowest, bool) or not isinstance(lowest, (int, float)) or not 0 <= lowest < 1e6:
        raise read.error("frequency_min", "must be a frequency in Hz", lowest)


def read_extractor(folder: Path) -> transformers.ClapFeatureExtractor:
    """What makes the spectrograms, from a checkpoint's feature_extractor. Raises ValueError naming the file."""
    check_extractor(folder / "preprocessor_config.json")
    return from_pretrained("ClapFeatureExtractor", folder)


def published_extractor() -> transformers.ClapFeatureExtractor:
    """What makes the spectrograms of the published checkpoints."""
    import transformers

    return transformers.ClapFeatureExtractor(**FEATURE_EXTRACTOR)


def audio_config(fields: Mapping[str, Any], source: str) -> transformers.ClapAudioConfig:
    """Config of CLAP's audio branch from the fields of a ClapModel's config.json. Raises ValueError naming `source`."""
    import transformers

    branch = clap_branch(fields, "audio_config", source)
    return transformers_config(transformers.ClapAudioConfig, branch, f"{source}: audio_config")


class ClapAudio(nn.Module):
    """Audio branch of CLAP, in float32: waveforms -> unit vectors (B, D) in the space that text and audio share."""

    def __init__(self, extractor: transformers.ClapFeatureExtractor, config: transformers.ClapAudioConfig):
        from transformers.models.clap import modeling_clap

        super().__init__()
        self.extractor, self.fusion = extractor, config.enable_fusion
        self.audio_model = modeling_clap.ClapAudioModel(config)
        self.audio_projection = modeling_clap.ClapProjectionLayer(config)

    @classmethod
    def load(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], extractor: transformers.ClapFeatureExtractor, *,
        device: torch.device | str | None = None, source: str = "text_encoder",
    ) -> ClapAudio:
        """From the fields of a ClapModel's config.json and its tensors. Raises ValueError naming `source`."""
        config = audio_config(fields, source)
        with weights.on_meta():
            audio = cls(extractor, config)
        with torch.device("cpu"):                          # whatever the default is
            module: Any
            for module in audio.modules():
                if hasattr(module, "create_relative_position_index"):
                    module.relative_position_index = module.create_relative_position_index()
        weights.load(audio, tensors, table=CLAP_AUDIO_ONLY, dtype=torch.float32, device=device, source=source)
        finite.check_finite(audio)                        # a score of NaN would put candidates into any order
        return audio

    def forward(self, waveforms: np.ndarray, sample_rate: int) -> Tensor:
        """waveforms (B, N) at sample_rate Hz -> (B, D), L2 norm 1.

        Of longer sounds the first seconds that CLAP can hear (10) count, never a random part; shorter ones are repeated
        as the extractor's settings say.
        """
        rate = self.extractor.sampling_rate
        heard = list(resample(waveforms, sample_rate, rate)[:, : self.extractor.nb_max_samples])
        # Nothing is longer than allowed, so nothing is cut at random. Of sounds that are heard together, a model with
        # fusion takes one at random for a long one; alone, each is.
        batches = [[sound] for sound in heard] if self.fusion else [heard]
        return torch.cat([self._embed(batch) for batch in batches])

    def _embed(self, heard: list[np.ndarray]) -> Tensor:
        """Sounds (N,) at the extractor's rate -> (B, D)."""
        # As numpy: its tensors would lie on the default device of the host program.
        features = self.extractor(heard, sampling_rate=self.extractor.sampling_rate, return_tensors="np",
                                  truncation="fusion" if self.fusion else "rand_trunc")
        device = self.audio_projection.linear1.weight.device
        inputs = torch.from_numpy(np.asarray(features["input_features"], dtype=np.float32))
        is_longer = torch.from_numpy(np.asarray(features["is_longer"], dtype=bool))
        states = self.audio_model(input_features=inputs.to(device), is_longer=is_longer.to(device))
        return F.normalize(self.audio_projection(states.pooler_output), dim=-1)


class Ranker:
    """Scores sounds by their texts. `text` may be the branch that a TextEncoder already holds."""

    def __init__(self, text: ClapText, audio: ClapAudio):
        self.text, self.audio = text, audio

    @usual_numpy
    @inference
    def scores(self, prompts: Sequence[str], waveforms: np.ndarray | Tensor, sample_rate: int) -> Tensor:
        """Similarity of each candidate with its own prompt: (P, n) float32 on the CPU, -1 to 1.

        prompts: P texts; waveforms (P * n, N): n candidates of the first prompt, then those of the second, ...
        """
        waveforms = np.asarray(waveforms, dtype=np.float32)
        if waveforms.ndim != 2 or not waveforms.shape[1] or not prompts or len(waveforms) % len(prompts):
            asked = f"{len(prompts)} prompts need waveforms of shape (prompts * candidates, samples)"
            raise ValueError(f"{asked}, got {waveforms.shape}")
        check_rows(waveforms)
        text = self.text(prompts).float()                                        # (P, D)
        audio = self.audio(waveforms, sample_rate).to(text.device)               # (P * n, D)
        return torch.einsum("pd,pnd->pn", text, audio.unflatten(0, (len(prompts), -1))).cpu()


def best_first(scores: Tensor) -> list[int]:
    """scores (P, n) -> rows of the candidates (P * n of them), prompt by prompt, within a prompt the best first.

    Candidates of one prompt never take the place of another's; equal ones keep their order.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)                  # (P, n)
    starts = torch.arange(scores.shape[0], device=scores.device)[:, None] * scores.shape[1]
    return (order + starts).flatten().tolist()
