"""What the UNet is conditioned on: the contexts of its cross-attentions and, in the FiLM models, one vector.

References: "AudioLDM 2", arXiv:2308.05734, section III (language of audio and text as two contexts);
"AudioLDM", arXiv:2301.12503, section 3.1 (one CLAP vector).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of B rows.

    contexts: one tensor (B, L_i, D_i) for each context, in the order in which the UNet counts them.
    masks:    for each context a bool or 0/1 tensor (B, L_i), true where a token is kept; None keeps all tokens.
    film:     (B, D) vector added to the time embedding by FiLM models; None in all others.

    Raises ValueError where the numbers of contexts and masks, the shapes or the rows disagree, and if nothing is given.
    """

    contexts: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    film: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.contexts) != len(self.masks):
            raise ValueError(f"each context needs one mask or None, got {len(self.contexts)} contexts and "
                             f"{len(self.masks)} masks")
        if not self.contexts and self.film is None:
            raise ValueError("a conditioning needs at least one context or a film vector")
        for context, mask in zip(self.contexts, self.masks):
            if context.ndim != 3:
                raise ValueError(f"a context must be (rows, tokens, width), got shape {tuple(context.shape)}")
            if mask is not None and mask.shape != context.shape[:2]:
                raise ValueError(f"mask {tuple(mask.shape)} does not fit its context {tuple(context.shape)}")
        if self.film is not None and self.film.ndim != 2:
            raise ValueError(f"film must be (rows, width), got shape {tuple(self.film.shape)}")
        rows = {tensor.shape[0] for tensor in self._values()}
        if len(rows) > 1:
            raise ValueError(f"contexts and film must have the same number of rows, got {sorted(rows)}")

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self._values()[0].shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """This conditioning on another device or in another floating dtype; masks keep their dtype."""
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)
        masks = tuple(None if mask is None else mask.to(device=device) for mask in self.masks)
        return Conditioning(tuple(move(context) for context in self.contexts), masks, move(self.film))

    def repeat(self, n: int) -> Conditioning:
        """Each row n times in succession: rows a, b become a, a, b, b for n = 2. n must be at least 1."""
        if n < 1:
            raise ValueError(f"a row must be repeated at least once, got {n}")
        rows = torch.arange(self.batch_size, device="cpu").repeat_interleave(n)
        return self.select(rows) if n > 1 else self

    def select(self, rows: Sequence[int] | slice | Tensor) -> Conditioning:
        """The rows with these indices, in this order; an index may come more than once."""
        def take(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or isinstance(rows, slice):
                return None if tensor is None else tensor[rows]
            return tensor[torch.as_tensor(rows, dtype=torch.long, device=tensor.device)]
        return Conditioning(tuple(take(context) for context in self.contexts),
                            tuple(take(mask) for mask in self.masks), take(self.film))

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of all parts, one below the other.

        Where context i differs in length, the shorter ones get zeros at the end which the mask drops, so that no row
        sees its neighbours. Raises ValueError if the parts differ in their number of contexts or only some have film.
        """
        if not parts:
            raise ValueError("nothing to join")
        if len({(len(part.contexts), part.film is None) for part in parts}) > 1:
            raise ValueError("conditionings of different kinds of model cannot be joined")
        columns = [_join_context([part.contexts[i] for part in parts], [part.masks[i] for part in parts])
                   for i in range(len(parts[0].contexts))]
        film = None if parts[0].film is None else torch.cat([part.film for part in parts])
        return Conditioning(tuple(context for context, _ in columns), tuple(mask for _, mask in columns), film)

    def _values(self) -> list[Tensor]:
        return [*self.contexts, *([] if self.film is None else [self.film])]


def _join_context(contexts: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Contexts [(B_j, L_j, D)] below each other as (sum B_j, max L_j, D), with the mask that drops what was added."""
    longest = max(context.shape[1] for context in contexts)
    joined = torch.cat([F.pad(context, (0, 0, 0, longest - context.shape[1])) for context in contexts])
    if all(mask is None for mask in masks) and all(context.shape[1] == longest for context in contexts):
        return joined, None
    kept = [context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            for context, mask in zip(contexts, masks)]
    return joined, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in kept])
