"""The frozen text encoders: CLAP's text branch and T5's encoder, each with its tokenizer.

The networks are made from the fields of a config.json and a dict of tensors, whatever file these come from.

References: CLAP, arXiv:2211.06687; FLAN-T5, arXiv:2210.11416.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import weights
from ldm2.checkpoints import int8
from ldm2.fields import Fields
from ldm2.ops import dense
from ldm2.text.configs import FIXED, read_config
from ldm2.text.roberta import ClapProjection, Roberta, RobertaConfig
from ldm2.text.t5 import T5Config, T5Encoder
from ldm2.text.tokenizers import LazyTokenizer, TextTokenizer

logger = logging.getLogger(__name__)

Tokenizer = TextTokenizer | LazyTokenizer
T5_TOKENS = 128  # longest text that the models were trained on, for tokenizers whose files set no limit

# A CLAP folder holds both branches; only one of them is wanted at a time. The other tables are computed, not learned.
CLAP_TEXT_ONLY = {
    r"(?:audio_model|audio_projection)\..*": None,
    r"logit_scale_[at]": None,
    r"text_model\.embeddings\.(?:position_ids|token_type_ids)": None,
    r"(text_model\..*\bLayerNorm)\.gamma": r"\1.weight",     # as the first releases of transformers 5 save them
    r"(text_model\..*\bLayerNorm)\.beta": r"\1.bias",
}


class ClapText(nn.Module):
    """Text branch of CLAP: prompts -> unit vectors (B, D) in the space that text and audio share."""

    def __init__(self, tokenizer: Tokenizer, config: RobertaConfig):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = min(tokenizer.model_max_length, config.max_position_embeddings - config.pad_token_id - 1)
        self.text_model = Roberta(config)
        self.text_projection = ClapProjection(config.hidden_size, config.projection_dim)

    @classmethod
    def load(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, source: str = "text_encoder",
    ) -> ClapText:
        """From the fields of a config.json (of a ClapModel or of its text branch alone) and the tensors of either."""
        if "text_config" in fields:
            branch = clap_branch(fields, "text_config", source)
            config = read_config(RobertaConfig, branch, f"{source}: text_config")
        else:
            config = read_config(RobertaConfig, fields, source)
        with weights.on_meta():
            clap = cls(tokenizer, config)
        return weights.load(clap, tensors, table=CLAP_TEXT_ONLY, dtype=dtype, device=device, source=source)

    def forward(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Prompts -> (B, D), L2 norm 1. Texts of more than max_length tokens are cut, with a warning."""
        ids, mask = tokenize(self.tokenizer, prompts, min(max_length or self.max_length, self.max_length), "CLAP")
        check_ids(ids, self.text_model.embeddings.word_embeddings.weight, "CLAP")
        device = self.text_projection.linear1.weight.device
        states = self.text_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return F.normalize(self.text_projection(states.pooler_output), dim=-1)


class T5Text(nn.Module):
    """Encoder of T5: prompts -> one state for each token."""

    def __init__(self, tokenizer: Tokenizer, config: T5Config):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = tokenizer.model_max_length if tokenizer.model_max_length < 1_000_000 else T5_TOKENS
        self.model = T5Encoder(config)

    @classmethod
    def load(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, source: str = "text_encoder_2",
    ) -> T5Text:
        """From the fields of a config.json and the tensors of a T5EncoderModel.

        In float16 the last matrix of each feed-forward stays float32: its sums leave the range of float16.
        """
        config = read_config(T5Config, fields, source)
        with weights.on_meta():
            t5 = cls(tokenizer, config)
        weights.load(t5.model, tensors, dtype=dtype, device=device, source=source)
        if dtype == torch.float16:
            held = int8.paired(tensors, source)
            for name, module in t5.model.named_modules():
                if name.endswith(".wo"):
                    wide = dense(held[f"{name}.weight"], torch.float32).to(device=device, dtype=torch.float32)
                    module.weight = nn.Parameter(wide, requires_grad=False)
        return t5.eval()

    def forward(self, prompts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Prompts -> states (B, L, D) and mask (B, L) bool.

        L is the length of the longest prompt in tokens, or `length`, to which all are then padded and cut.
        """
        ids, mask = tokenize(self.tokenizer, prompts, length or self.max_length, "T5", pad=length is not None)
        check_ids(ids, self.model.shared.weight, "T5")
        device = self.model.shared.weight.device
        ids, mask = ids.to(device), mask.to(device)
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, name: str, pad: bool = False
) -> tuple[Tensor, Tensor]:
    """Texts -> token ids (B, L) int64 and mask (B, L) bool, padded to the longest or, with `pad`, to max_length.

    Longer texts are cut at max_length tokens; a warning names what is lost. `name` is the encoder's, for the warning.
    """
    rows = tokenizer(texts)
    for place, (text, ids) in enumerate(zip(texts, rows, strict=True)):
        if len(ids) > max_length:
            lost = tokenizer.decode(ids[max_length - 1 : -1])
            logger.warning("%s reads %d tokens; cut from %r: %r", name, max_length, text[:40], lost[:400])
            rows[place] = ids[: max_length - 1] + ids[-1:]                       # the end token keeps its place
    length = max_length if pad else max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
    return torch.tensor(ids, device="cpu"), torch.tensor(mask, device="cpu")


def clap_branch(fields: Mapping[str, Any], branch: str, source: str) -> dict[str, Any]:
    """Fields of one branch of CLAP, "text_config" or "audio_config", from those of a ClapModel's config.json."""
    for name in ("text_config", "audio_config"):
        if not isinstance(fields.get(name), Mapping):
            raise ValueError(f"{source}: {name} is missing: the file does not describe a whole CLAP model")
    read = Fields(fields, source)
    read.check_fixed(FIXED["ClapConfig"])
    width = 512 if fields.get("projection_dim") is None else read.integer("projection_dim")
    return {**fields[branch], "projection_dim": width}     # the one of both branches counts


def check_ids(ids: Tensor, table: Tensor, name: str) -> None:
    """Raise ValueError if a token has no row in the table of embeddings; `name` is the encoder's."""
    if int(ids.max()) >= table.shape[0]:
        raise ValueError(
            f"the tokenizer of {name} gives the number {int(ids.max())}, but its table has {table.shape[0]} rows: it "
            "is the tokenizer of another model"
        )
