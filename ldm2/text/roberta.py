"""The network of CLAP's text branch: RoBERTa with a pooled first token, and the projection into the space of CLAP.

References: RoBERTa, arXiv:1907.11692; CLAP, arXiv:2211.06687, section 2.1. Parameters are named as in the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RobertaConfig:
    """Sizes, named as in the text_config of a ClapModel's config.json, whose defaults they have."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    projection_dim: int = 512
    pad_token_id: int = 1


class States(NamedTuple):
    """What an encoder makes of tokens: last_hidden_state (B, L, D), and pooler_output (B, D) where it has one."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, scale: float | None) -> Tensor:
    """query (B, L, D), key and value (B, M, D) -> (B, L, D), split into heads of equal width.

    mask: which keys count, bool, or what is added to the scores; broadcast to (B, H, L, M). scale: of the scores,
    None is one over the square root of a head's width.
    """
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))  # (B, H, L, D / H)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Tokens that count (B, L), bool or 0 and 1 -> a mask of keys (B, 1, 1, L); None where all count."""
    if mask is None or mask.bool().all():
        return None
    return mask.bool()[:, None, None]


class Embeddings(nn.Module):
    """Words, positions and the one type of token, summed."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        width = config.hidden_size
        self.pad = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=self.pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, padding_idx=self.pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D). Positions count tokens, not padding, and begin after the padding's number."""
        counts = ids != self.pad
        positions = counts.cumsum(dim=1) * counts + self.pad
        types = self.token_type_embeddings(torch.zeros_like(ids))
        return self.LayerNorm(self.word_embeddings(ids) + types + self.position_embeddings(positions))


class Residual(nn.Module):
    """A linear layer, added to what came before, and normalized."""

    def __init__(self, in_features: int, out_features: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.LayerNorm = nn.LayerNorm(out_features, eps=eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each normalized afterwards."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention: Any = nn.ModuleDict({"self": projections, "output": Residual(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Residual(hidden, width, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (project(x) for project in self.attention["self"].values())
        x = self.attention["output"](attend(query, key, value, self.heads, mask, None), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Roberta(nn.Module):
    """Token ids -> a state for each, and one for the text."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder: Any = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> States:
        """input_ids (B, L) and attention_mask (B, L), 0 at padding."""
        x, mask = self.embeddings(input_ids), key_mask(attention_mask)
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return States(x, torch.tanh(self.pooler["dense"](x[:, 0])))


class ClapProjection(nn.Module):
    """A state of a branch of CLAP (B, D) -> (B, E) in the space of both."""

    def __init__(self, width: int, projection_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(width, projection_dim)
        self.linear2 = nn.Linear(projection_dim, projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))
