"""The network of T5's encoder.

References: T5, arXiv:1910.10683, section 2.1 (relative positions, no biases); gated GELU, arXiv:2002.05202; RMS norm,
arXiv:1910.07467. Parameters are named as in the checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2.text.roberta import States, attend, key_mask

FARTHEST = 128                                             # tokens from which on all distances count as one
EPS = 1e-6


@dataclass(frozen=True)
class T5Config:
    """Sizes, named as in the config.json of a T5EncoderModel, whose defaults they have."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    feed_forward_proj: str = "relu"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward networks have gates, as from T5 1.1 on."""
        return self.feed_forward_proj.startswith("gated")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)), scaled; in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + EPS)
        return self.weight * normalized.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention without scale; the first block of an encoder holds the table of relative positions for all."""

    def __init__(self, config: T5Config, has_positions: bool):
        super().__init__()
        width = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, config.d_model, bias=False)
        self.relative_attention_bias: Any
        if has_positions:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def bias(self, length: int) -> Tensor:
        """What is added to the scores for the distances between tokens: (1, H, L, L)."""
        table = self.relative_attention_bias
        places = torch.arange(length, device=table.weight.device)
        return table(buckets(places[None] - places[:, None], table.num_embeddings)).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, bias.to(x.dtype), 1.0))


class FeedForward(nn.Module):
    """Two layers with ReLU, or with a gated GELU between (tanh approximation)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.gated
        if self.gated:
            self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        dtype = self.wo.weight.dtype                       # float32 in a float16 model, see T5Text.load
        return self.wo(x.to(dtype) if dtype.is_floating_point else x)


class T5Encoder(nn.Module):
    """Token ids -> a state for each."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        blocks = [nn.ModuleDict({"layer": nn.ModuleList([
            nn.ModuleDict({"SelfAttention": SelfAttention(config, i == 0), "layer_norm": RMSNorm(config.d_model)}),
            nn.ModuleDict({"DenseReluDense": FeedForward(config), "layer_norm": RMSNorm(config.d_model)}),
        ])}) for i in range(config.num_layers)]
        self.encoder: Any = nn.ModuleDict({                # one table under two names, of which files hold one or both
            "embed_tokens": self.shared, "block": nn.ModuleList(blocks), "final_layer_norm": RMSNorm(config.d_model),
        })

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> States:
        """input_ids (B, L) and attention_mask (B, L), 0 at padding."""
        x, mask, bias = self.shared(input_ids), key_mask(attention_mask), None
        for block in self.encoder["block"]:
            attention, feed_forward = block["layer"]
            if bias is None:
                bias = attention["SelfAttention"].bias(input_ids.shape[1])
                bias = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
            x = x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))
        return States(self.encoder["final_layer_norm"](x))


def buckets(distances: Tensor, count: int) -> Tensor:
    """Signed distances in tokens -> numbers of the rows of a table of `count`: half of them for each direction, of
    which half are single distances, the others grow with the logarithm up to FARTHEST."""
    half = count // 2
    exact = half // 2
    apart = distances.abs()
    grown = torch.log(apart.clamp(min=1).float() / exact) / math.log(FARTHEST / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return torch.where(apart < exact, apart, far) + half * (distances > 0)
