"""Tokenizers that threads may share: they read as those of transformers do."""

from __future__ import annotations

import json

import pytest
import transformers

from benchmarks import checkpoints
from ldm2.checkpoints.hub import BUNDLED
from ldm2.text.tokenizers import TextTokenizer, read_folder

TEXTS = [
    *checkpoints.CAPTIONS, "a", " ", "  two   spaces ", "Tiers & \"quotes\"!?", "naïve café", "雨が降る", "🎻 violin",
    "a\nb\tc", "<mask> </s> <pad>", "rain " * 200, "e\u0301", "\u200b", "ﬁre",
]
KINDS = [("tokenizer", "RobertaTokenizer"), ("tokenizer_2", "T5Tokenizer")]


@pytest.mark.parametrize(("folder", "kind"), KINDS)
@pytest.mark.parametrize("bundled", [False, True])
def test_a_tokenizer_reads_as_that_of_transformers(tiny_checkpoint, folder, kind, bundled):
    place = (BUNDLED / "tiny" if bundled else tiny_checkpoint) / folder
    ours, theirs = read_folder(kind, place), getattr(transformers, kind).from_pretrained(place)
    assert isinstance(ours, TextTokenizer)
    assert ours(TEXTS) == theirs(TEXTS)["input_ids"]
    assert (ours.model_max_length, ours.pad_token_id) == (theirs.model_max_length, theirs.pad_token_id)
    assert ours.decode(ours(["a dog"])[0]) == theirs.decode(ours(["a dog"])[0])


@pytest.mark.parametrize("call", [{"padding": "max_length", "max_length": 9, "truncation": True}, {"padding": True}])
def test_what_a_caller_does_with_a_tokenizer_of_transformers_changes_ours_not(call):
    theirs = checkpoints.roberta_tokenizer()
    ours = TextTokenizer.of(theirs)
    before = ours(TEXTS)
    theirs(TEXTS, **call)
    assert ours(TEXTS) == before


@pytest.mark.parametrize(("change", "message"), [
    ({"model_max_length": 0}, "model_max_length must be a number of at least 1, got 0"),
    ({"pad_token": "<none>"}, "knows no token .<none>., the pad_token"),
])
def test_what_makes_no_sense_is_named(tiny_checkpoint, tmp_path, change, message):
    source = tiny_checkpoint / "tokenizer"
    fields = json.loads((source / "tokenizer_config.json").read_text()) | change
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=message):
        read_folder("RobertaTokenizer", tmp_path)
