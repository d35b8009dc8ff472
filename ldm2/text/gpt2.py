"""Text embeddings -> the sequence that GPT-2 continues -> "language of audio", one vector after another.

Reference: "AudioLDM 2", arXiv:2308.05734, section III-B (language of audio) and equation 5 (its autoregressive model).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ldm2 import weights
from ldm2.fields import Fields, positive_integer, short
from ldm2.text.configs import transformers_config

# Names of GPT-2 with its word head (GPT2LMHeadModel) -> names without; the head is not used.
WITHOUT_HEAD = {r"lm_head\.weight": None, **weights.OLD_NAMES, r"transformer\.(.*)": r"\1"}


@dataclass(frozen=True)
class ProjectionConfig:
    """Widths of the projection. `position_embeddings` is the length of the table of the speech models, or None."""

    clap_dim: int
    text_dim: int
    width: int
    position_embeddings: int | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "projection config") -> ProjectionConfig:
        """Reads the fields of a projection_model/config.json. Raises ValueError naming `source` and the field."""
        learned = fields.get("use_learned_position_embedding")
        if learned not in (None, False, True):
            rule = "use_learned_position_embedding must be true, false or null"
            raise ValueError(f"{source}: {rule}, got {short(learned)}")
        names = ["text_encoder_dim", "text_encoder_1_dim", "langauge_model_dim"]  # misspelt in the files
        if learned is not None:
            names.append("max_seq_length")
        Fields(fields, source).check_fixed({"_class_name": ("AudioLDM2ProjectionModel",)})
        for name in names:
            try:
                positive_integer(fields.get(name))
            except ValueError as error:
                raise ValueError(f"{source}: {name} {error}, got {repr(fields.get(name))[:100]}") from None
        return cls(*(fields[name] for name in names))


class Projection(nn.Module):
    """CLAP vector and text states -> [sos, clap, eos, sos_1, states, eos_1], all as wide as GPT-2.

    Parameter names as in diffusers' AudioLDM2ProjectionModel.
    """

    def __init__(self, config: ProjectionConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.clap_dim, config.width)
        self.projection_1 = nn.Linear(config.text_dim, config.width)
        self.sos_embed = nn.Parameter(torch.ones(config.width))
        self.eos_embed = nn.Parameter(torch.ones(config.width))
        self.sos_embed_1 = nn.Parameter(torch.ones(config.width))
        self.eos_embed_1 = nn.Parameter(torch.ones(config.width))
        if config.position_embeddings is not None:
            shape = (1, config.text_dim, config.position_embeddings)
            self.learnable_positional_embedding = nn.Parameter(torch.zeros(shape))

    def forward(self, clap: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """clap (B, D0), states (B, L, D1), mask (B, L) bool -> sequence (B, L + 5, D) and its mask (B, L + 5) bool.

        Padding stays where it is, between the text and eos_1. In the speech models L is the length of the table of
        positions, which is added at padding as well.
        """
        if self.config.position_embeddings is not None:
            states = states + self.learnable_positional_embedding.transpose(1, 2)
        sequence = torch.cat([
            _between(self.sos_embed, self.projection(clap)[:, None], self.eos_embed),
            _between(self.sos_embed_1, self.projection_1(states), self.eos_embed_1),
        ], dim=1)
        return sequence, F.pad(F.pad(mask, (4, 0), value=True), (0, 1), value=True)


def _between(start: Tensor, sequence: Tensor, end: Tensor) -> Tensor:
    """(B, L, D) -> (B, L + 2, D) with one vector (D,) before and one after."""
    rows = sequence.shape[0]
    return torch.cat([start.expand(rows, 1, -1), sequence, end.expand(rows, 1, -1)], dim=1)


def load_projection(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, source: str = "projection_model",
) -> Projection:
    """Projection from the fields of its config.json and its tensors. Raises ValueError naming `source`."""
    config = ProjectionConfig.from_dict(fields, source)
    with weights.on_meta():
        projection = Projection(config)
    return weights.load(projection, tensors, dtype=dtype, device=device, source=source)


def load_gpt2(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, source: str = "language_model",
) -> transformers.GPT2Model:
    """GPT-2 without head from the fields of its config.json and its tensors, maybe those of a GPT2LMHeadModel."""
    no_tokens = {"bos_token_id": None, "eos_token_id": None}      # unused, and a warning where the table is small
    config = transformers_config(transformers.GPT2Config, {**fields, **no_tokens}, source)
    with weights.on_meta():
        gpt2 = transformers.GPT2Model(config)
    return weights.load(gpt2, tensors, table=WITHOUT_HEAD, dtype=dtype, device=device, source=source)


def continue_sequence(gpt2: transformers.GPT2Model, sequence: Tensor, mask: Tensor, num_vectors: int) -> Tensor:
    """sequence (B, L, D) with mask (B, L) bool -> the next `num_vectors` vectors (B, num_vectors, D).

    Each vector is the last output of GPT-2 (after its final norm) and the next input; no token is ever chosen.
    Positions count padding too. Keys and values of earlier positions are kept, so that each is computed once.
    Raises ValueError if GPT-2 has not enough positions.
    """
    length, positions = sequence.shape[1], gpt2.config.n_positions
    if length + num_vectors - 1 > positions:
        raise ValueError(f"{length} vectors of text and {num_vectors} new ones exceed GPT-2's {positions} positions")
    kept = None if mask.all() else mask
    cache = {_cache_argument(gpt2): transformers.DynamicCache(config=gpt2.config)}
    vectors = [sequence[:, :0]]
    for _ in range(num_vectors):
        output = gpt2(inputs_embeds=sequence, attention_mask=kept, use_cache=True, **cache)
        sequence = output.last_hidden_state[:, -1:]                              # (B, 1, D)
        vectors.append(sequence)
        kept = None if kept is None else F.pad(kept, (0, 1), value=True)
    return torch.cat(vectors, dim=1)


def _cache_argument(gpt2: transformers.GPT2Model) -> str:
    """Name of the argument that takes the KV cache; transformers 5.24 gave it a new one, and warns of the old."""
    names = inspect.signature(type(gpt2).forward).parameters
    return "cache" if "cache" in names else "past_key_values"
