"""What GPT-2 reads of captions, kept in files, so that the projection before it can learn: its vectors come anew in
every step, and T5 and CLAP need not run again. References: arXiv:2308.05734, section III.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.stages import Stages
from ldm2.training.encoding import Report, Store, Text, basis_of, key_of

_NAMES = ("clap", "states", "mask")
_KEPT = 512                                # captions that stay in memory


def check_projection(pipe: Stages) -> None:
    """Raise ValueError for a model without one."""
    if pipe.text.gpt2 is None:
        raise ValueError("layers holds projection, which this model has not: it conditions its UNet without GPT-2")


def encode_words(pipe: Stages, model: str, texts: Iterable[Text], store: Store, report: Report) -> int:
    """Put what the projection takes of captions (with what is said) into the store. Returns how many there are.

    model: a digest of the files that the pipe is made from.
    """
    basis = basis_of(pipe, model)
    keys = {text: _key(key_of("text", *basis, *text)) for text in texts}
    missing = [text for text, key in keys.items() if not store.has(key)]
    if missing:
        with pipe.stages["text"]:
            for done, (caption, spoken) in enumerate(missing):
                report("encoding captions", done, len(missing))
                inputs = pipe.text.inputs(caption, transcription=spoken if pipe.text.is_speech_model else None)
                store.put(keys[caption, spoken], {name: each.cpu() for name, each in zip(_NAMES, inputs)})
    return len(keys)


class Words:
    """The vectors of GPT-2 for the rows of a batch, with a gradient, from what `encode_words` has kept."""

    def __init__(self, pipe: AudioLDM2, store: Store):
        self._pipe, self._store = pipe, store
        self._inputs = lru_cache(_KEPT)(self._read)

    def __call__(self, conditioning: Conditioning, texts: Sequence[str]) -> Conditioning:
        """A conditioning on the model's device whose first context is made anew; texts: the keys of its rows.

        What was not kept, such as the unconditional side, stays as it is.
        """
        vectors = {text: self._generate(text) for text in dict.fromkeys(texts)}
        first, *others = conditioning.contexts
        rows = [first[i : i + 1] if (made := vectors[text]) is None else made for i, text in enumerate(texts)]
        return Conditioning((torch.cat(rows), *others), conditioning.masks, conditioning.film)

    def _generate(self, text: str) -> Tensor | None:
        inputs = self._inputs(text)
        if inputs is None:
            return None
        clap, states, mask = (each.to(self._pipe.device) for each in inputs)
        return self._pipe.text.generate(clap, states, mask, self._pipe.text.num_vectors).float()

    def _read(self, text: str) -> tuple[Tensor, ...] | None:
        if not self._store.has(_key(text)):
            return None
        kept = self._store.get(_key(text))
        return tuple(kept[name] for name in _NAMES)


def _key(text: str) -> str:
    """Where it is for the conditioning with that key."""
    return key_of("words", text)
