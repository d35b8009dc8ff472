"""Phonemes: their ids, and the encoder against the authors' outputs."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import VitsTokenizer

from benchmarks import checkpoints
from ldm2 import weights
from ldm2.text.phonemes import END, SYMBOLS, PhonemeText, training_tokenizer

DATA = Path(__file__).parents[1] / "data" / "conditioning"
AUTHORS_NAMES = {
    r"learnable_positional_embedding": None,
    r"text_encoder\.emb\.weight": "embed_tokens.weight",
    r"text_encoder\.encoder\.attn_layers\.(\d+)\.conv_([qkv])\.(.*)": r"encoder.layers.\1.attention.\2_proj.\3",
    r"text_encoder\.encoder\.attn_layers\.(\d+)\.conv_o\.(.*)": r"encoder.layers.\1.attention.out_proj.\2",
    r"text_encoder\.encoder\.attn_layers\.(\d+)\.(emb_rel_[kv])": r"encoder.layers.\1.attention.\2",
    r"text_encoder\.encoder\.norm_layers_1\.(\d+)\.gamma": r"encoder.layers.\1.layer_norm.weight",
    r"text_encoder\.encoder\.norm_layers_1\.(\d+)\.beta": r"encoder.layers.\1.layer_norm.bias",
    r"text_encoder\.encoder\.norm_layers_2\.(\d+)\.gamma": r"encoder.layers.\1.final_layer_norm.weight",
    r"text_encoder\.encoder\.norm_layers_2\.(\d+)\.beta": r"encoder.layers.\1.final_layer_norm.bias",
    r"text_encoder\.encoder\.ffn_layers\.(\d+)\.(.*)": r"encoder.layers.\1.feed_forward.\2",
    r"text_encoder\.proj\.(.*)": r"project.\1",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return checkpoints.vits_tokenizer(tmp_path_factory.mktemp("vits"))


def encoder(tokenizer, places: int = 40) -> PhonemeText:
    model = checkpoints.vits()
    return PhonemeText.load(model.config.to_dict(), dict(model.state_dict()), tokenizer, places)


class FakeEspeak:
    """Stands for the package phonemizer, which is not needed for testing what we do with its answers."""

    def __init__(self, answer: str | Exception):
        self.answer = answer

    def phonemize(self, text: str, **settings) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def espeak(monkeypatch):
    """Install a phonemizer that gives this answer."""
    from transformers.models.vits import tokenization_vits

    def install(answer: str | Exception) -> None:
        for check, answers in (("requires_backends", None), ("is_phonemizer_available", True)):   # of new and old
            monkeypatch.setattr(tokenization_vits, check, lambda *needed, answers=answers: answers, raising=False)
        monkeypatch.setattr(tokenization_vits, "phonemizer", FakeEspeak(answer), raising=False)

    return install


@torch.no_grad()
def test_states_equal_the_authors(tokenizer):
    golden, prefix = load_file(DATA / "golden.safetensors"), "cond_stage_models.0.cond_stage_models.1."
    tensors = {k.removeprefix(prefix): v for k, v in weights.read_tensors(DATA / "phoneme.pth").items()}
    positions = tensors["learnable_positional_embedding"]
    renamed = weights.rename(tensors, AUTHORS_NAMES, source="phoneme.pth")
    renamed = {name: value.squeeze(-1) if "_proj" in name else value for name, value in renamed.items()}
    phonemes = PhonemeText.load({"vocab_size": 183}, renamed, tokenizer, 48)
    mask = golden["phon.mask"].bool()
    states = phonemes.encode(golden["phon.ids"], mask) + positions.transpose(1, 2)
    torch.testing.assert_close(states, golden["phon.out"], atol=5e-5, rtol=0)


@torch.no_grad()
def test_end_symbol_follows_the_text_and_the_rest_is_masked_zeros(tokenizer):
    phonemes = encoder(tokenizer)
    states, mask = phonemes([phonemes.tokenize_ipa("ab"), phonemes.tokenize_ipa("abcd")])
    assert mask.sum(dim=1).tolist() == [3, 5]
    assert states.shape == (2, 40, 16)
    assert not states[0, 3:].any()
    ids = torch.tensor([[*phonemes.tokenize_ipa("ab"), END]])
    alone = phonemes.encode(ids, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(states[:1, :3], alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_full_row_has_no_end_symbol(tokenizer, caplog):
    phonemes = encoder(tokenizer, places=4)
    with caplog.at_level(logging.WARNING):
        ids = phonemes.tokenize_ipa("abcdef")
    assert len(ids) == 4
    assert "cut from 'abcdef': the last 2" in caplog.text
    assert phonemes([ids])[1].all()


def test_transcription_is_read_by_espeak(tokenizer, espeak, monkeypatch):
    espeak("hɛˈ\n ː")
    monkeypatch.setattr(tokenizer, "phonemize", True)
    phonemes = encoder(tokenizer)
    assert phonemes.phonemize("anything") == phonemes.tokenize_ipa("hɛˈ ː")


def test_missing_phonemizer_says_how_to_install_it(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "phonemizer", None)
    monkeypatch.setattr(tokenizer, "phonemize", True)
    message = r'pip install phonemizer.*apt install espeak-ng.*brew install.*winget install.*phonemes='
    with pytest.raises(ValueError, match=message):
        encoder(tokenizer).phonemize("hello")


def test_missing_espeak_says_how_to_install_it(tokenizer, espeak, monkeypatch):
    espeak(RuntimeError("espeak not installed\non your system"))
    monkeypatch.setattr(tokenizer, "phonemize", True)
    with pytest.raises(ValueError, match=r"\(espeak not installed on your system\): install .*espeak-ng"):
        encoder(tokenizer).phonemize("hello")


def test_errors_are_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "phonemize", True)
    with pytest.raises(ValueError) as raised:
        encoder(tokenizer).phonemize("hello")
    assert "\n" not in str(raised.value)


def test_symbols_that_the_model_does_not_know_are_named(tokenizer):
    with pytest.raises(ValueError, match=re.escape("does not know: ! ?")):
        encoder(tokenizer).tokenize_ipa("a?b!")


def test_text_without_any_known_symbol_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"no phonemes.*'!!!'"):
        encoder(tokenizer).phonemize("!!!")


def test_blanks_between_phonemes_are_added_where_the_tokenizer_asks_for_them(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "add_blank", True)
    phonemes = encoder(tokenizer)
    assert phonemes.tokenize_ipa("ab") == phonemes.phonemize("ab") == (0, 2, 0, 3, 0)


def test_parts_that_only_speak_are_left_out(tokenizer):
    names = [name for name, _ in encoder(tokenizer).named_parameters()]
    assert names
    assert all(name.startswith("text_encoder.") for name in names)


def test_too_small_a_table_is_an_error(tokenizer):
    model = checkpoints.vits()
    with pytest.raises(ValueError, match=r"a file: vocab_size.*182.*180"):
        PhonemeText.load(model.config.to_dict() | {"vocab_size": 180}, {}, tokenizer, 40, source="a file")


def letters(folder: Path, count: int = 38, **settings) -> VitsTokenizer:
    """A tokenizer such as that of MMS: letters and no phonemes, the padding in the middle, no limit."""
    path = folder / "vocab.json"
    path.write_text(json.dumps({chr(0x4E00 + i): i for i in range(count)}))
    return VitsTokenizer(path, pad_token=chr(0x4E14), add_blank=False, phonemize=False, **settings)


@pytest.mark.parametrize("count", [38, 177, 184])
def test_a_tokenizer_of_another_model_is_refused_with_the_way_out(tmp_path, count):
    message = f"183 phonemes.*{count} symbols.*audioldm2-speech-ljspeech"
    with pytest.raises(ValueError, match=message):
        encoder(letters(tmp_path, count))


def test_numbers_that_repeat_or_leave_gaps_are_refused(tokenizer, monkeypatch):
    for broken in ({"_": 0, "a": 182}, {"_": 0, **{chr(0x4E00 + i): 1 for i in range(182)}}):
        monkeypatch.setattr(tokenizer, "encoder", broken)
        with pytest.raises(ValueError, match="another model"):
            encoder(tokenizer)


def test_the_marks_that_no_text_contains_may_be_missing(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encoder", {s: i for s, i in tokenizer.encoder.items() if i < 178})
    assert encoder(tokenizer).tokenize_ipa("ab") == (2, 3)


def test_the_symbols_of_the_training_are_numbered_as_in_vits(espeak):
    # https://github.com/jaywalnut310/vits/blob/main/text/symbols.py: 178 symbols, to which AudioLDM 2 adds five
    tokenizer = training_tokenizer()
    assert len(SYMBOLS) == END + 1
    known = {"_": 0, ";": 1, " ": 16, "A": 17, "a": 43, "z": 68, "ɑ": 69, "ˈ": 156, "ː": 158, "ᵻ": 177, "⚠": 182}
    assert {symbol: tokenizer.encoder[symbol] for symbol in known} == known
    espeak("hɛloʊ  wˈɜːld")
    assert encoder(tokenizer).phonemize("Hello world") == tuple(tokenizer.encoder[s] for s in "hɛloʊ wˈɜːld")
