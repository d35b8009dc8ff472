"""Projection and GPT-2 loop, against the authors' outputs and against a loop without cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from benchmarks import checkpoints
from ldm2 import weights
from ldm2.text.gpt2 import ProjectionConfig, generate_vectors, load_gpt2, load_projection

DATA = Path(__file__).parents[1] / "data" / "conditioning"
WIDTHS = {"text_encoder_dim": 512, "text_encoder_1_dim": 1024, "langauge_model_dim": 768}


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden.safetensors")


@pytest.fixture(scope="module")
def authors():
    """Tensors of the authors' sequence model, without the prefix of its place."""
    tensors = weights.read_tensors(DATA / "sequence.pth")
    return {name.removeprefix("cond_stage_models.0."): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def projection(authors):
    starts, ends = authors["start_of_sequence_tokens.weight"], authors["end_of_sequence_tokens.weight"]
    tensors = {"sos_embed": starts[0], "sos_embed_1": starts[1], "eos_embed": ends[0], "eos_embed_1": ends[1]}
    for i, name in enumerate(["projection", "projection_1"]):
        for leaf in ("weight", "bias"):
            tensors[f"{name}.{leaf}"] = authors[f"input_sequence_embed_linear.{i}.{leaf}"]
    return load_projection(WIDTHS, tensors)


@pytest.fixture(scope="module")
def gpt2(authors):
    tensors = {name.removeprefix("model."): tensor for name, tensor in authors.items() if name.startswith("model.")}
    return load_gpt2({"n_layer": 2}, tensors)


def tiny_gpt2(**changes) -> transformers.GPT2Model:
    model = checkpoints.gpt2()
    return load_gpt2(model.config.to_dict() | changes, model.state_dict())


@torch.no_grad()
def test_projection_equals_the_authors(golden, projection):
    sequence, mask = projection(golden["seq.clap"][:, 0], golden["seq.t5"], golden["seq.t5_mask"].bool())
    torch.testing.assert_close(sequence, golden["seq.input_embeds"], atol=1e-6, rtol=0)
    assert torch.equal(mask, golden["seq.input_mask"].bool())


@torch.no_grad()
def test_generated_vectors_equal_the_authors(golden, gpt2):
    vectors = generate_vectors(gpt2, golden["seq.input_embeds"], golden["seq.input_mask"].bool(), 8)
    torch.testing.assert_close(vectors, golden["seq.generated"], atol=5e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cached_loop_equals_transformers_computing_everything_again(padded):
    model, gpt2 = checkpoints.gpt2(), tiny_gpt2()
    sequence = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        mask[0, 4:6] = False
    expected, grown = sequence, mask
    for _ in range(20):
        output = model(inputs_embeds=expected, attention_mask=grown, use_cache=False).last_hidden_state
        expected, grown = torch.cat([expected, output[:, -1:]], dim=1), F.pad(grown, (0, 1), value=True)
    torch.testing.assert_close(generate_vectors(gpt2, sequence, mask, 20), expected[:, 7:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_inside_the_sequence_moves_positions():
    """Why prompts are encoded alone: the mask hides padding, but later positions still count it."""
    gpt2, sequence = tiny_gpt2(), torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    alone = generate_vectors(gpt2, sequence, torch.ones(1, 5, dtype=torch.bool), 2)
    padded = torch.cat([sequence[:, :4], torch.zeros(1, 3, 24), sequence[:, 4:]], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 3 + [True]])
    assert (generate_vectors(gpt2, padded, mask, 2) - alone).abs().max() > 1e-2


@torch.no_grad()
def test_sequence_longer_than_the_positions_is_an_error():
    mask = torch.ones(1, 250, dtype=torch.bool)
    with pytest.raises(ValueError, match="exceed GPT-2's 256 positions"):
        generate_vectors(tiny_gpt2(), torch.zeros(1, 250, 24), mask, 8)


@torch.no_grad()
def test_last_position_can_be_used():
    mask = torch.ones(1, 250, dtype=torch.bool)
    assert generate_vectors(tiny_gpt2(), torch.zeros(1, 250, 24), mask, 7).shape == (1, 7, 24)


def test_gpt2_with_word_head_loads_as_one_without():
    plain = checkpoints.gpt2()
    with_head = transformers.GPT2LMHeadModel(plain.config)
    with_head.transformer.load_state_dict(plain.state_dict())
    loaded = load_gpt2(plain.config.to_dict(), dict(with_head.state_dict()))
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_causal_masks_of_old_files_are_dropped():
    plain = checkpoints.gpt2()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.ones(())}
    assert load_gpt2(plain.config.to_dict(), dict(plain.state_dict()) | masks).ln_f.weight.shape == (24,)


def test_missing_gpt2_weight_is_named():
    plain = checkpoints.gpt2()
    tensors = dict(plain.state_dict())
    del tensors["h.1.mlp.c_fc.weight"]
    with pytest.raises(ValueError, match=r"some/folder .*1 missing \(h\.1\.mlp\.c_fc\.weight\)"):
        load_gpt2(plain.config.to_dict(), tensors, source="some/folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_dim": None}, "text_encoder_dim must be a positive integer, got None"),
        ({"langauge_model_dim": 0}, "langauge_model_dim must be a positive integer, got 0"),
        ({"use_learned_position_embedding": True}, "max_seq_length must be a positive integer, got None"),
        ({"use_learned_position_embedding": "yes"}, "use_learned_position_embedding must be true, false or null"),
    ],
)
def test_impossible_projection_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=f"a file: {message}"):
        ProjectionConfig.from_dict(WIDTHS | changes, "a file")


def test_impossible_gpt2_config_names_its_source():
    with pytest.raises(ValueError, match="a file: "):
        load_gpt2({"n_layer": "two"}, {}, source="a file")
