"""What is to be said -> phonemes -> one state for each, for the speech models.

Reference: VITS, arXiv:2106.06103, section 2.2.1 (prior encoder): a transformer with relative positions.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm2 import weights
from ldm2.fields import flat
from ldm2.text.configs import transformers_config

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

PAD = 0
END = 182  # the symbol that the models were trained to see after the last phoneme
PLACES = 310  # phonemes in a sequence of the published models, with the padding
MARKS = 5  # the last symbols of the table, END among them, which no text contains

# The table of the training: padding, punctuation, letters, IPA (where of two apostrophes the last counts) and marks,
# numbered through.
SYMBOLS = (
    "_" ';:,.!?¡¿—…"«»“” ' "ABCDEFGHIJKLMNOPQRSTUVWXYZ" "abcdefghijklmnopqrstuvwxyz"
    "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃ"
    "ˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'\u0329'ᵻ" "♪☎☒☝⚠"
)

_espeak = threading.Lock()                                 # espeak-ng is one C library with a state of its own

# A VitsModel can speak by itself; only its text encoder is wanted.
TEXT_ENCODER_ONLY = {
    r"(?:flow|decoder|duration_predictor|posterior_encoder|embed_speaker)\..*": None,
    r"text_encoder\.(.*)": r"\1",
}

INSTALL = (
    'install phonemizer with `pip install phonemizer` and espeak-ng with `apt install espeak-ng` (Debian, Ubuntu), '
    "`dnf install espeak-ng` (Fedora), `brew install espeak-ng` (macOS) or `winget install eSpeak-NG.eSpeak-NG` "
    "(Windows), or pass ready phonemes (phonemes=) instead of a transcription"
)


def training_tokenizer() -> transformers.VitsTokenizer:
    """The tokenizer of the training: English text through espeak-ng to phonemes, or phonemes as they are."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({symbol: number for number, symbol in enumerate(SYMBOLS)}), encoding="utf-8")
        return transformers.VitsTokenizer(
            path, pad_token="_", unk_token="_", add_blank=False, phonemize=True, model_max_length=PLACES
        )


def check_symbols(tokenizer: transformers.VitsTokenizer, size: int, source: str) -> None:
    """Raise ValueError unless `tokenizer` numbers the symbols of a table of `size` rows, from 0 for padding.

    The marks at the end of the table, and one number that two symbols would share, may be missing. The tokenizer of
    another model (38 letters of MMS, for one) would pick phonemes at random.
    """
    numbers = list(tokenizer.encoder.values())
    whole = all(isinstance(number, int) and number >= 0 for number in numbers) and len(set(numbers)) == len(numbers)
    last = max(numbers, default=0) if whole else 0
    if whole and size - MARKS <= last + 1 <= size and len(numbers) >= last and tokenizer.pad_token_id == PAD:
        return
    raise ValueError(
        f"{source}: its table holds {size} phonemes, but the tokenizer_2 beside it knows {len(numbers)} symbols with "
        f"padding {tokenizer.pad_token_id}: it is the tokenizer of another model, take the authors' .pth file "
        "(audioldm2-speech-ljspeech or audioldm2-speech-gigaspeech), for which ldm2 has the symbols"
    )


class PhonemeText(nn.Module):
    """Text encoder of VITS: phonemes -> one state for each place of a sequence of fixed length."""

    def __init__(self, tokenizer: transformers.VitsTokenizer, config: transformers.VitsConfig, max_length: int):
        from transformers.models.vits import modeling_vits

        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.text_encoder = modeling_vits.VitsTextEncoder(config)

    @classmethod
    def load(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: transformers.VitsTokenizer,
        max_length: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        source: str = "text_encoder_2",
    ) -> PhonemeText:
        """From the fields of a config.json and the tensors of a VitsModel or of its text encoder.

        max_length: places in the sequence, as many as the projection has positions.
        Raises ValueError if the tokenizer is not the model's.
        """
        import transformers

        config = transformers_config(transformers.VitsConfig, fields, source)
        if config.vocab_size <= END:
            raise ValueError(f"{source}: vocab_size must be above {END}, the end symbol, got {config.vocab_size}")
        check_symbols(tokenizer, config.vocab_size, source)
        with weights.on_meta():
            phonemes = cls(tokenizer, config, max_length)
        table = {**weights.OLD_NAMES, **TEXT_ENCODER_ONLY}
        weights.load(phonemes.text_encoder, tensors, table=table, dtype=dtype, device=device, source=source)
        return phonemes.eval()

    def phonemize(self, transcription: str) -> tuple[int, ...]:
        """English text -> ids of phonemes, at most max_length. Raises ValueError without phonemizer or espeak-ng."""
        try:
            with _espeak:
                ids = self.tokenizer(transcription, verbose=False)["input_ids"]
        except ImportError as error:
            raise ValueError(f"a transcription needs the package phonemizer: {INSTALL}") from error
        except RuntimeError as error:                                            # phonemizer's own, espeak is missing
            raise ValueError(f"no phonemes for this transcription ({flat(error)}): {INSTALL}") from error
        return self._fit(ids, transcription)

    def tokenize_ipa(self, phonemes: str) -> tuple[int, ...]:
        """Phonemes in IPA, as espeak-ng writes them -> ids, at most max_length. Raises ValueError for other symbols."""
        unknown = sorted(set(phonemes) - self.tokenizer.get_vocab().keys())
        if unknown:
            raise ValueError(f"phonemes hold symbols that the model does not know: {' '.join(unknown)}")
        ids: Any = self.tokenizer.convert_tokens_to_ids(list(phonemes))
        if self.tokenizer.add_blank:
            ids = [PAD, *(number for symbol in ids for number in (symbol, PAD))]
        return self._fit(ids, phonemes)

    def _fit(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        if not ids:
            raise ValueError(f"no phonemes found in {text[:40]!r}")
        if len(ids) > self.max_length:
            logger.warning("speech ends after %d phonemes; cut from %r: the last %d",
                           self.max_length, text[:40], len(ids) - self.max_length)
        if any(number >= self.text_encoder.config.vocab_size for number in ids):
            raise ValueError(f"the model does not know all phonemes of {text[:40]!r}")
        return tuple(ids[: self.max_length])

    def forward(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids -> states (B, max_length, D), zero at padding, and mask (B, max_length) bool.

        The end symbol takes the first free place and counts as part of the text; a row that fills all places has none.
        """
        ids = torch.full((len(rows), self.max_length), self.tokenizer.pad_token_id, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, numbers in enumerate(rows):
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long, device="cpu")
            mask[row, : len(numbers)] = True
            free = (ids[row] == PAD).nonzero()
            if len(free):
                ids[row, free[0]], mask[row, free[0]] = END, True
        device = self.text_encoder.embed_tokens.weight.device
        ids, mask = ids.to(device), mask.to(device)
        return self.encode(ids, mask), mask

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Padded ids (B, L) with mask (B, L) bool, true where there is a phoneme -> states (B, L, D), else zero."""
        encoder = self.text_encoder
        states = encoder.embed_tokens(ids) * math.sqrt(encoder.config.hidden_size)           # (B, L, D)
        kept = mask[:, :, None].to(states.dtype)
        bias = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
        bias = bias[:, None, None].expand(-1, 1, ids.shape[1], -1)                           # (B, 1, L, L), added
        states = states * kept
        for layer in encoder.encoder.layers:
            states = layer(states, padding_mask=kept, attention_mask=bias)[0]
        return states * kept
