"""CLAP's text branch and T5's encoder, against transformers' own classes."""

from __future__ import annotations

import logging

import pytest
import torch

from benchmarks import checkpoints
from benchmarks.checkpoints import CAPTIONS
from ldm2.text.encoders import ClapText, T5Text, tokenize
from ldm2.text.tokenizers import TextTokenizer


@pytest.fixture(scope="module")
def clap_model():
    return checkpoints.clap()


@pytest.fixture(scope="module")
def t5_model():
    return checkpoints.t5()


def clap_words(model_max_length: int = 77) -> TextTokenizer:
    return TextTokenizer.of(checkpoints.roberta_tokenizer(model_max_length))


def t5_words(model_max_length: int = 128) -> TextTokenizer:
    return TextTokenizer.of(checkpoints.t5_tokenizer(model_max_length))


def clap(model, **how) -> ClapText:
    return ClapText.load(model.config.to_dict(), dict(model.state_dict()), clap_words(), **how)


def t5(model, **how) -> T5Text:
    return T5Text.load(model.config.to_dict(), dict(model.state_dict()), t5_words(), **how)


@torch.no_grad()
def test_clap_vectors_equal_the_whole_model(clap_model):
    tokens = checkpoints.roberta_tokenizer()(CAPTIONS, padding="max_length", return_tensors="pt")
    expected = clap_model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(clap(clap_model)(CAPTIONS), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_clap_loads_from_a_text_branch_alone(clap_model):
    branch = {k: v for k, v in clap_model.state_dict().items() if k.startswith("text_")}
    alone = ClapText.load(clap_model.config.text_config.to_dict(), branch, clap_words())
    assert torch.equal(alone(CAPTIONS), clap(clap_model)(CAPTIONS))


@torch.no_grad()
def test_clap_loads_without_the_tables_that_older_files_have(clap_model):
    names = ("text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids")
    tensors = {name: tensor for name, tensor in clap_model.state_dict().items() if name not in names}
    loaded = ClapText.load(clap_model.config.to_dict(), tensors, clap_words())
    assert torch.equal(loaded(CAPTIONS), clap(clap_model)(CAPTIONS))


@torch.no_grad()
def test_clap_loads_with_the_names_that_transformers_5_gave_layer_norms_when_it_saved(clap_model):
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    tensors = dict(clap_model.state_dict())
    for name in list(tensors):
        for new, given in old.items():
            if name.startswith("text_model.") and name.endswith(new):
                tensors[name.replace(new, given)] = tensors.pop(name)
    assert len(tensors.keys() - clap_model.state_dict().keys()) > 5
    loaded = ClapText.load(clap_model.config.to_dict(), tensors, clap_words())
    assert torch.equal(loaded(CAPTIONS), clap(clap_model)(CAPTIONS))


def test_audio_branch_is_not_loaded(clap_model):
    assert not [name for name, _ in clap(clap_model).named_parameters() if "audio" in name]


@torch.no_grad()
def test_t5_states_equal_transformers(t5_model):
    tokens = checkpoints.t5_tokenizer()(CAPTIONS, padding=True, return_tensors="pt")
    states, mask = t5(t5_model)(CAPTIONS)
    torch.testing.assert_close(states, t5_model(**tokens).last_hidden_state, atol=1e-6, rtol=0)
    assert torch.equal(mask, tokens["attention_mask"].bool())


@pytest.mark.parametrize("missing", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_t5_loads_from_files_with_one_name_for_its_table(t5_model, missing, tied):
    """FLAN-T5's config says tie_word_embeddings false, which is about the decoder's output."""
    tensors = {name: tensor for name, tensor in t5_model.state_dict().items() if name != missing}
    fields = t5_model.config.to_dict() | {"tie_word_embeddings": tied}
    loaded = T5Text.load(fields, tensors, t5_words())
    assert torch.equal(loaded(CAPTIONS)[0], t5(t5_model)(CAPTIONS)[0])


@torch.no_grad()
def test_t5_pads_and_cuts_to_a_given_length(t5_model):
    states, mask = t5(t5_model)(["", CAPTIONS[1]], length=5)
    assert states.shape[:2] == (2, 5)
    assert mask.sum(dim=1).tolist() == [1, 5]


def test_nothing_is_copied_when_the_dtype_fits(t5_model):
    tensors = dict(t5_model.state_dict())
    loaded = T5Text.load(t5_model.config.to_dict(), tensors, t5_words(), dtype=torch.float32)
    assert loaded.model.shared.weight.data_ptr() == tensors["shared.weight"].data_ptr()


def test_loaded_parts_are_in_evaluation_mode_and_frozen(clap_model, t5_model):
    for part in (clap(clap_model), t5(t5_model)):
        assert not any(module.training for module in part.modules())
        assert not any(parameter.requires_grad for parameter in part.parameters())


@torch.no_grad()
def test_float16_t5_keeps_its_widest_sums_in_float32(t5_model):
    half = t5(t5_model, dtype=torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {f"model.encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    states, _ = half(CAPTIONS)
    assert states.dtype == torch.float16
    torch.testing.assert_close(states.float(), t5(t5_model)(CAPTIONS)[0], atol=2e-2, rtol=0)


@torch.no_grad()
def test_float16_t5_survives_sums_that_float16_cannot_hold(t5_model):
    tensors = {k: v * 300 if k.endswith(("wi_0.weight", "wo.weight")) else v for k, v in t5_model.state_dict().items()}
    half = T5Text.load(t5_model.config.to_dict(), tensors, t5_words(), dtype=torch.float16)
    assert half(CAPTIONS)[0].isfinite().all()


@torch.no_grad()
def test_bfloat16_is_bfloat16_throughout(t5_model):
    low = t5(t5_model, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert low(CAPTIONS)[0].dtype == torch.bfloat16


def test_missing_clap_weight_is_named(clap_model):
    tensors = dict(clap_model.state_dict())
    del tensors["text_projection.linear2.bias"]
    with pytest.raises(ValueError, match=r"a folder .*1 missing \(text_projection\.linear2\.bias\)"):
        ClapText.load(clap_model.config.to_dict(), tensors, clap_words(), source="a folder")


def test_foreign_t5_weight_is_named(t5_model):
    tensors = dict(t5_model.state_dict()) | {"encoder.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected \(encoder\.extra\)"):
        T5Text.load(t5_model.config.to_dict(), tensors, t5_words())


def test_impossible_config_names_its_source(t5_model):
    fields = t5_model.config.to_dict() | {"num_layers": "many"}
    with pytest.raises(ValueError, match=r"a file: .*num_layers") as raised:
        T5Text.load(fields, {}, t5_words(), source="a file")
    assert "\n" not in str(raised.value)


def test_cut_text_is_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        ids, _ = tokenize(t5_words(), ["a dog barking in the rain"], 12, "T5")
    assert ids.shape == (1, 12)
    assert ids[0, -1] == 1                                                       # the end token keeps its place
    assert "T5 reads 12 tokens; cut from 'a dog barking in the rain': 'in the rain'" in caplog.text


def test_text_that_fits_gives_no_warning(caplog):
    tokenize(t5_words(), CAPTIONS, 128, "T5")
    assert not caplog.records


def test_clap_cuts_at_its_number_of_positions(clap_model, caplog):
    tokenizer = clap_words(model_max_length=10**30)
    clap_text = ClapText.load(clap_model.config.to_dict(), dict(clap_model.state_dict()), tokenizer)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert clap_text(["rain " * 200]).isfinite().all()
    assert "CLAP reads 78 tokens" in caplog.text


def test_t5_tokenizer_without_limit_is_cut_where_the_models_were_trained(t5_model):
    tokenizer = t5_words(model_max_length=10**30)
    assert T5Text.load(t5_model.config.to_dict(), dict(t5_model.state_dict()), tokenizer).max_length == 128
