"""The small text side: tokenizers, the modules, and their first lesson, which is to say what a caption describes.

References: BPE, arXiv:1508.07909; unigram language model, arXiv:1804.10959; "AudioLDM 2", arXiv:2308.05734, section
III.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ldm2 import weights
from ldm2.conditioning import Conditioning
from ldm2.text.configs import read_config
from ldm2.text.encoder import NUM_VECTORS
from ldm2.text.encoders import ClapText, T5Text
from ldm2.text.gpt2 import GPT2, GPT2Config, Projection, ProjectionConfig, generate_vectors
from ldm2.text.roberta import RobertaConfig
from ldm2.text.t5 import T5Config
from ldm2.text.tokenizers import TextTokenizer
from ldm2.training.loop import Clock, Recipe, train
from ldm2.training.tiny.data import Pool
from ldm2.training.tiny.sounds import KINDS, LEVELS, halves

WIDTH = 64                                 # of everything here
_DROPPED = 0.1                             # of the prompts


def byte_pair_tokenizer(captions: Sequence[str], size: int) -> transformers.RobertaTokenizer:
    """Byte-level pairs with RoBERTa's special tokens: any text can be written with them."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(captions, vocab_size=size, min_frequency=1, special_tokens=special, show_progress=False)
    model = json.loads(trainer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)


def unigram_tokenizer(captions: Sequence[str], size: int) -> transformers.T5Tokenizer:
    """Unigram pieces with T5's special tokens; every printable ASCII character is a piece, all else is <unk>."""
    trainer = tokenizers.SentencePieceUnigramTokenizer()
    trainer.train_from_iterator(captions, vocab_size=size, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"],
                                initial_alphabet=[chr(c) for c in range(33, 127)], show_progress=False)
    vocab = [(piece, score) for piece, score in json.loads(trainer.to_str())["model"]["vocab"]]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=128)


def clap_model(tokenizer: transformers.RobertaTokenizer) -> transformers.ClapModel:
    """CLAP with both branches in small; the audio branch takes 16 mels x 256 frames of 40 ms."""
    config = transformers.ClapConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 80,
                     "projection_dim": WIDTH,
                     "pad_token_id": 1},
        audio_config={"spec_size": 64, "window_size": 4, "num_mel_bins": 16, "depths": [2, 2],
                      "num_attention_heads": [2, 4], "num_hidden_layers": 2, "hidden_size": 64,
                      "patch_embeds_hidden_size": 32, "projection_dim": WIDTH, "patch_size": 4, "patch_stride": [4, 4],
                      "mlp_ratio": 2.0},
        projection_dim=WIDTH,
    )
    return transformers.ClapModel(config)


class TextSide(nn.Module):
    """What turns prompts into the UNet's two contexts, with gradients. CLAP is trained before and stays as it is."""

    def __init__(self, captions: Sequence[str], clap: transformers.ClapModel, tokenizer: transformers.RobertaTokenizer):
        super().__init__()
        text_config = clap.config.text_config.to_dict()
        self.clap = ClapText(TextTokenizer.of(tokenizer), read_config(RobertaConfig, text_config, "CLAP"))
        self.clap.text_model, self.clap.text_projection = clap.text_model, clap.text_projection
        self.clap.requires_grad_(False).eval()
        pieces = unigram_tokenizer(captions, 400)
        self.t5_config = transformers.T5Config(
            vocab_size=len(pieces), d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False)
        with weights.on_meta():
            self.t5 = T5Text(TextTokenizer.of(pieces), read_config(T5Config, self.t5_config.to_dict(), "T5"))
        _begin_as(self.t5.model, transformers.T5EncoderModel(self.t5_config))
        self.projection = Projection(ProjectionConfig(WIDTH, WIDTH, WIDTH))
        for vector in (self.projection.sos_embed, self.projection.eos_embed, self.projection.sos_embed_1,
                       self.projection.eos_embed_1):
            nn.init.normal_(vector)
        self.gpt2_config = transformers.GPT2Config(
            vocab_size=16, n_positions=160, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.gpt2_config.max_new_tokens = NUM_VECTORS
        with weights.on_meta():
            self.gpt2 = GPT2(read_config(GPT2Config, self.gpt2_config.to_dict(), "GPT-2"))
        _begin_as(self.gpt2, transformers.GPT2Model(self.gpt2_config))
        self.gpt2.wte.requires_grad_(False)

    def forward(self, prompts: Sequence[str], zeroed: Tensor | None = None) -> Conditioning:
        """Prompts -> Conditioning. Rows of the bool tensor `zeroed` (B,) get zeros for GPT-2's vectors."""
        states, mask = self.t5(prompts)
        with torch.no_grad():
            clap = self.clap(prompts)
        vectors = generate_vectors(self.gpt2, *self.projection(clap, states, mask), NUM_VECTORS)
        if zeroed is not None:
            vectors = torch.where(zeroed[:, None, None], torch.zeros_like(vectors), vectors)
        return Conditioning((vectors, states), (None, mask))


def _begin_as(module: nn.Module, other: nn.Module) -> None:
    """Take the first weights from a module of transformers, which knows how each is drawn."""
    module.load_state_dict(other.state_dict(), assign=True)


def drop_prompts(prompts: Sequence[str], generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Replaces a tenth of the prompts by ""; of half of those the vectors are to be zeroed: (prompts, bool (B,)).

    Both forms of the unconditional model are thus learnt: the authors' (zeros) and diffusers' (the empty prompt).
    """
    draw = torch.rand(len(prompts), generator=generator)
    dropped = ["" if d < _DROPPED else prompt for prompt, d in zip(prompts, draw.tolist())]
    return dropped, draw < _DROPPED / 2


def vary(prompts: Sequence[str], generator: torch.Generator) -> list[str]:
    """Sentence case and a full stop for some of them, since people write so."""
    draw = torch.rand(len(prompts), 2, generator=generator).tolist()
    cased = [p[:1].upper() + p[1:] if a < 0.25 else p for p, (a, _) in zip(prompts, draw)]
    return [p + "." if b < 0.15 else p for p, (_, b) in zip(cased, draw)]


class Describer(nn.Module):
    """Linear readers of the two contexts: kind of the first half, of the second half, and level."""

    def __init__(self, text: TextSide):
        super().__init__()
        self.text = text
        self.sizes = (len(KINDS), len(KINDS), len(LEVELS))
        self.heads = nn.ModuleList([nn.Linear(WIDTH, sum(self.sizes)) for _ in range(2)])

    def loss(self, conditioning: Conditioning, targets: Tensor) -> Tensor:
        """Cross-entropy of the descriptions, targets (B, 3); a row of -100 does not count."""
        scores = self.read(conditioning)
        return sum(F.cross_entropy(part, targets[:, i]) for parts in scores for i, part in enumerate(parts))

    def read(self, conditioning: Conditioning) -> list[tuple[Tensor, ...]]:
        """For each context the scores of the three descriptions."""
        vectors, states = conditioning.contexts
        mask = conditioning.masks[1][..., None].to(states)
        means = vectors.mean(dim=1), (states * mask).sum(dim=1) / mask.sum(dim=1)
        return [head(mean).split(self.sizes, dim=1) for head, mean in zip(self.heads, means)]


def descriptions(pool: Pool) -> Tensor:
    """Kinds of both halves and level of each clip: (M, 3) int64."""
    kinds, levels = list(KINDS), list(LEVELS)
    pairs = [halves(label) or (label, label) for label in pool.labels]
    return torch.tensor([(kinds.index(a), kinds.index(b), levels.index(v)) for (a, b), v in zip(pairs, pool.levels)])


def train_description(describer: Describer, pool: Pool, held_out: Pool, recipe: Recipe, clock: Clock) -> None:
    """T5, projection and GPT-2 learn to keep what a caption says where a linear reader finds it."""
    text = describer.text
    device = text.projection.sos_embed.device
    targets, wanted = descriptions(pool).to(device), descriptions(held_out).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (48,), generator=generator)
        prompts = vary([pool.captions[i] for i in rows], generator)
        return describer.loss(text(prompts), targets[rows.to(device)])

    def evaluate() -> dict[str, float]:
        parts = describer.read(text(held_out.captions[:128]))
        names = ("vectors", "states")
        right = [[(s.argmax(1) == wanted[:128, i]).float().mean() for i, s in enumerate(scores)] for scores in parts]
        return {f"{name}_{what}": value for name, row in zip(names, right)
                for what, value in zip(("first", "second", "level"), row)}

    train("description", describer, loss, recipe, clock, evaluate, evaluate_every=100)
