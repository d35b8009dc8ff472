"""Text embeddings -> the sequence that GPT-2 continues -> "language of audio", one vector after another.

Reference: "AudioLDM 2", arXiv:2308.05734, section III-B (language of audio) and equation 5 (its autoregressive model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import weights
from ldm2.fields import Fields, positive_integer, short
from ldm2.text.configs import read_config
from ldm2.text.roberta import attend

# Names of GPT-2 with its word head (GPT2LMHeadModel) -> names without; the head is not used.
WITHOUT_HEAD = {r"lm_head\.weight": None, **weights.OLD_NAMES, r"transformer\.(.*)": r"\1"}

KeyValue = tuple[Tensor, Tensor]


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


@dataclass(frozen=True)
class GPT2Config:
    """Sizes, named as in the config.json of a GPT2Model, whose defaults they have."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None                             # four times the width


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2's files have it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Block(nn.Module):
    """Causal self-attention and a feed-forward network with GELU (tanh approximation), each normalized before."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        width, hidden = config.n_embd, config.n_inner or 4 * config.n_embd
        self.heads = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(width, 3 * width), "c_proj": Conv1D(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(width, hidden), "c_proj": Conv1D(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor | None, before: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """x (B, L, D), keys and values (B, M, D) of the positions before -> x, and those of all positions."""
        query, key, value = self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1)
        if before is not None:
            key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
        x = x + self.attn["c_proj"](attend(query, key, value, self.heads, mask, None))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden), (key, value)


class GPT2(nn.Module):
    """Vectors -> a state for each that knows those before it. Parameters are named as in the checkpoints."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)                # in the files; no token is ever read
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: Sequence[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """x (B, L, D), after the M positions whose keys and values are in `cache` -> states (B, L, D), new cache.

        mask (B, M + L): which positions count, None for all.
        """
        start = 0 if cache is None else cache[0][0].shape[1]
        places = torch.arange(start, start + x.shape[1], device=x.device)
        allowed = None
        if mask is not None or x.shape[1] > 1:
            allowed = torch.arange(start + x.shape[1], device=x.device) <= places[:, None]       # (L, M + L)
            allowed = allowed if mask is None else allowed & mask.bool()[:, None, None]
        x = x + self.wpe(places)
        kept = []
        for block, before in zip(self.h, cache or [None] * len(self.h), strict=True):
            x, now = block(x, allowed, before)
            kept.append(now)
        return self.ln_f(x), kept


def load_gpt2(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, source: str = "language_model",
) -> GPT2:
    """GPT-2 without head from the fields of its config.json and its tensors, maybe those of a GPT2LMHeadModel."""
    config = read_config(GPT2Config, fields, source)
    with weights.on_meta():
        gpt2 = GPT2(config)
    return weights.load(gpt2, tensors, table=WITHOUT_HEAD, dtype=dtype, device=device, source=source)


def generate_vectors(gpt2: GPT2, sequence: Tensor, mask: Tensor, num_vectors: int) -> Tensor:
    """sequence (B, L, D) with mask (B, L) bool -> the next `num_vectors` vectors (B, num_vectors, D).

    Each vector is the last output of GPT-2 (after its final norm) and the next input; no token is ever chosen.
    Positions count padding too. Keys and values of earlier positions are kept, so that each is computed once.
    Raises ValueError if GPT-2 has not enough positions.
    """
    length, positions = sequence.shape[1], gpt2.config.n_positions
    if length + num_vectors - 1 > positions:
        raise ValueError(f"{length} vectors of text and {num_vectors} new ones exceed GPT-2's {positions} positions")
    kept, cache = None if mask.all() else mask, None
    vectors = [sequence[:, :0]]
    for _ in range(num_vectors):
        states, cache = gpt2(sequence, kept, cache)
        sequence = states[:, -1:]                                                # (B, 1, D)
        vectors.append(sequence)
        kept = None if kept is None else F.pad(kept, (0, 1), value=True)
    return torch.cat(vectors, dim=1)
