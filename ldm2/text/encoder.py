"""Prompts -> Conditioning: the text side of every kind of model.

    AudioLDM 2           CLAP + T5       -> GPT-2 -> contexts (generated vectors, T5 states)
    AudioLDM 2, speech   CLAP + phonemes -> GPT-2 -> contexts (generated vectors)
    AudioLDM             CLAP                     -> film
    AudioLDM with T5     T5                       -> contexts (T5 states)

References: "AudioLDM 2", arXiv:2308.05734, section III; "AudioLDM", arXiv:2301.12503, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm2.conditioning import Conditioning
from ldm2.config import check_reference
from ldm2.fields import short
from ldm2.options import check_text
from ldm2.runtime.inference import inference
from ldm2.text.encoders import ClapText, T5Text
from ldm2.text.gpt2 import GPT2, Projection, generate_vectors
from ldm2.text.phonemes import PhonemeText

__all__ = ["Conditioning", "TextEncoder"]

NUM_VECTORS = 8                # vectors that GPT-2 writes
NUM_SPEECH_VECTORS = 512       # the same in the speech models


@dataclass(frozen=True)
class Line:
    """What one row is made of: a prompt and, in the speech models, the ids of the phonemes to say."""

    prompt: str
    phonemes: tuple[int, ...] | None = None


UNCONDITIONAL = Line("")


class TextEncoder(nn.Module):
    """The text encoders of one checkpoint. Which of them are given decides the kind of model, as in the table above.

    reference="authors": each line is encoded alone, so that no padding enters GPT-2; the unconditional side of its
    vectors is zeros, as in training. reference="diffusers": lines are padded together and the unconditional side is the
    empty prompt, padded and cut like the prompts and run through GPT-2, as diffusers' pipelines do it.
    num_vectors: what the checkpoint's language_model/config.json calls max_new_tokens, None if it does not say.
    """

    def __init__(
        self, *, clap: ClapText | None = None, t5: T5Text | None = None, phonemes: PhonemeText | None = None,
        projection: Projection | None = None, gpt2: GPT2 | None = None,
        num_vectors: int | None = None, reference: str = "authors",
    ):
        super().__init__()
        check_reference(reference)
        self.clap, self.t5, self.phonemes, self.projection, self.gpt2 = clap, t5, phonemes, projection, gpt2
        self.reference = reference
        self.num_vectors = self._num_vectors(num_vectors)

    def _num_vectors(self, listed: int | None) -> int:
        """The number of vectors to generate, from the number that the checkpoint lists.

        Converted speech checkpoints may still list the 8 of the others, where the authors generate 512.
        """
        if listed is not None and (isinstance(listed, bool) or not isinstance(listed, int) or not 0 < listed < 10_000):
            raise ValueError(f"max_new_tokens must be a positive integer, got {short(listed)}")
        if self.phonemes is not None and (listed is None or (listed == NUM_VECTORS and self.reference == "authors")):
            if self.gpt2 is None:
                return NUM_SPEECH_VECTORS
            return min(NUM_SPEECH_VECTORS, self.gpt2.config.n_positions - self.phonemes.max_length - 5)
        return NUM_VECTORS if listed is None else listed

    @property
    def is_speech_model(self) -> bool:
        """Whether each prompt needs a transcription (or phonemes) to say."""
        return self.phonemes is not None

    @inference
    def encode(
        self, prompts: str | Sequence[str], *, transcription: str | Sequence[str] | None = None,
        phonemes: str | Sequence[str] | None = None, num_vectors: int | None = None,
    ) -> Conditioning:
        """Prompts -> Conditioning with one row for each, in their order. Equal rows are computed once.

        transcription, phonemes: what to say, English text or ready phonemes (IPA), one for all prompts or one each; a
        speech model needs one of the two, other models take neither.
        num_vectors: how many vectors GPT-2 writes; None is what the checkpoint asks for.
        Raises ValueError for an empty prompt and for anything that is not a string.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("there is no prompt")
        for prompt in prompts:
            check_text("prompt", prompt)
        lines = self._lines(prompts, transcription, phonemes)
        num_vectors = self.num_vectors if num_vectors is None else num_vectors
        if self.reference == "diffusers":
            return _once(lines, lambda distinct: self._encode_padded(distinct, num_vectors))
        return _once(lines, lambda distinct: self._encode_unpadded(distinct, num_vectors))

    @inference
    def encode_unconditional(
        self, conditioning: Conditioning, negative_prompts: str | Sequence[str] | None = None, *,
        transcription: str | Sequence[str] | None = None, phonemes: str | Sequence[str] | None = None,
    ) -> Conditioning:
        """The other side of classifier-free guidance for the rows of `conditioning`, as `encode` returned them.

        negative_prompts: one for all rows or one each; None and "" mean the unconditional model. With
        reference="authors" a negative prompt is encoded like a prompt, in the speech models with the same words to say,
        so it needs the same `transcription` or `phonemes`.
        """
        rows = conditioning.batch_size
        negatives = _spread("" if negative_prompts is None else negative_prompts, rows, "negative prompt")
        for negative in negatives:
            check_text("negative_prompt", negative, may_be_empty=True)
        if self.reference == "diffusers":
            return _once(negatives, lambda distinct: self._negative_as_diffusers(distinct, conditioning))
        num_vectors = conditioning.contexts[0].shape[1] if self.gpt2 is not None else 0
        lines = [UNCONDITIONAL] * rows
        if any(negative.strip() for negative in negatives):
            lines = self._lines(negatives, transcription, phonemes)
        lines = [line if line.prompt.strip() else UNCONDITIONAL for line in lines]
        return _once(lines, lambda distinct: self._encode_unpadded(distinct, num_vectors))

    @inference
    def unconditional(self, rows: int) -> Conditioning:
        """The unconditional model for rows that have no prompt beside them."""
        if self.reference == "authors":
            return self._unconditional(self.num_vectors).repeat(rows)
        if self.phonemes is None:
            return self._encode_padded([UNCONDITIONAL], self.num_vectors).repeat(rows)
        return self._speechless([""], self.num_vectors).repeat(rows)

    @inference
    def inputs(self, prompt: str, *, transcription: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `generate` takes for one prompt: clap (1, D0), states (1, L, D1) and mask (1, L). Needs a GPT-2."""
        [line] = self._lines([prompt], transcription, None)
        states, mask = self.t5([prompt]) if self.phonemes is None else self.phonemes([line.phonemes])
        return self.clap([prompt]), states, mask

    def generate(self, clap: Tensor, states: Tensor, mask: Tensor, num_vectors: int) -> Tensor:
        """clap (B, D0), states (B, L, D1) of T5 or phonemes, mask (B, L) bool -> GPT-2's (B, num_vectors, D)."""
        sequence, places = self.projection(clap, states, mask)
        return generate_vectors(self.gpt2, sequence, places, num_vectors)

    def _lines(
        self, prompts: Sequence[str], transcription: str | Sequence[str] | None, phonemes: str | Sequence[str] | None
    ) -> list[Line]:
        """Prompts with what they say. Raises ValueError where the model needs words and gets none, or the reverse."""
        given = {"transcription": transcription, "phonemes": phonemes}
        given = {name: text for name, text in given.items() if text is not None}
        if not self.is_speech_model:
            if given:
                raise ValueError(f"{' and '.join(given)} is only for speech models; this checkpoint is not one")
            return [Line(prompt) for prompt in prompts]
        if len(given) != 1:
            count = "both" if given else "neither"
            raise ValueError(f"this is a speech model: give it transcription or phonemes, got {count}")
        [(name, words)] = given.items()
        words = _spread(words, len(prompts), name)
        for text in words:
            check_text(name, text)
        read = self.phonemes.phonemize if name == "transcription" else self.phonemes.tokenize_ipa
        ids = {text: read(text) for text in dict.fromkeys(words)}
        return [Line(prompt, ids[text]) for prompt, text in zip(prompts, words)]

    def _encode_unpadded(self, lines: list[Line], num_vectors: int) -> Conditioning:
        """One row for each line (no two equal), none of which changes another.

        Phonemes always fill the same number of places, so lines to say can share a batch without sharing padding.
        """
        prompted = [line for line in lines if line != UNCONDITIONAL]
        batches = [[line] for line in prompted] if self.phonemes is None else [prompted]
        parts = [self._encode_padded(batch, num_vectors) for batch in batches if batch]
        if len(prompted) < len(lines):
            parts.append(self._unconditional(num_vectors))
        order = [*prompted, UNCONDITIONAL]
        return Conditioning.join(parts).select([order.index(line) for line in lines])

    def _encode_padded(self, lines: list[Line], num_vectors: int, length: int | None = None) -> Conditioning:
        """Lines in one batch: T5 states padded to the longest, or padded and cut to `length` tokens."""
        prompts = [line.prompt for line in lines]
        if self.phonemes is not None:
            states, mask = self.phonemes([line.phonemes for line in lines])
            return Conditioning((self.generate(self.clap(prompts), states, mask, num_vectors),), (None,))
        if self.t5 is None:
            return Conditioning((), (), film=self.clap(prompts, length))
        states, mask = self.t5(prompts, length)
        kept = None if mask.all() else mask
        if self.gpt2 is None:
            return Conditioning((states,), (kept,))
        return Conditioning((self.generate(self.clap(prompts), states, mask, num_vectors), states), (None, kept))

    def _unconditional(self, num_vectors: int) -> Conditioning:
        """The authors' unconditional row: what the encoders make of "", but zeros for GPT-2's vectors."""
        if self.gpt2 is None:
            return self._encode_padded([UNCONDITIONAL], 0)
        zeros = self.projection.sos_embed.new_zeros(1, num_vectors, self.projection.config.width)
        if self.phonemes is not None:
            return Conditioning((zeros,), (None,))
        states, _ = self.t5([""])
        return Conditioning((zeros, states), (None, None))

    def _negative_as_diffusers(self, negatives: list[str], conditioning: Conditioning) -> Conditioning:
        """diffusers' negative side: tokens padded and cut to the prompts' length, GPT-2 run on it, nothing to say."""
        lines = [Line(negative) for negative in negatives]
        if conditioning.film is not None:
            return self._encode_padded(lines, 0, length=conditioning.film.shape[1])    # its width: 512, as CLAP's limit
        num_vectors = conditioning.contexts[0].shape[1]
        if self.phonemes is None:
            return self._encode_padded(lines, num_vectors, length=conditioning.contexts[-1].shape[1])
        return self._speechless(negatives, num_vectors)

    def _speechless(self, negatives: list[str], num_vectors: int) -> Conditioning:
        """Rows of a speech model in which nothing is said: no place of the phonemes counts."""
        clap = self.clap(negatives)
        states = clap.new_zeros(len(negatives), self.phonemes.max_length, self.projection.config.text_dim)
        nothing = states.new_zeros(states.shape[:2], dtype=torch.bool)
        return Conditioning((self.generate(clap, states, nothing, num_vectors),), (None,))


def _spread(texts: str | Sequence[str], rows: int, name: str) -> list[str]:
    """One text for each row. Raises ValueError for any other number than one string or `rows` of them."""
    texts = [texts] * rows if isinstance(texts, str) else list(texts)
    if len(texts) != rows:
        raise ValueError(f"give one {name} for all or one for each of the {rows} prompts, got {len(texts)}")
    return texts


def _once(lines: list, encode: Callable[[list], Conditioning]) -> Conditioning:
    """encode(the distinct lines), its rows then repeated so that there is one for each line."""
    distinct = list(dict.fromkeys(lines))
    encoded = encode(distinct)
    return encoded if distinct == lines else encoded.select([distinct.index(line) for line in lines])
