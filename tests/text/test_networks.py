"""The networks of the text encoders, against transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from benchmarks import checkpoints
from ldm2.text.configs import read_config
from ldm2.text.gpt2 import GPT2, GPT2Config
from ldm2.text.roberta import Roberta, RobertaConfig
from ldm2.text.t5 import T5Config, T5Encoder, buckets

pytestmark = pytest.mark.fast

MASK = torch.tensor([[1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]])


def ours(kind, config, theirs):
    """Our network with the weights of transformers'."""
    network = kind(read_config(config, theirs.config.to_dict(), "x"))
    state = {name: value for name, value in theirs.state_dict().items() if name in network.state_dict()}
    network.load_state_dict(state)
    return network.eval()


def ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, MASK.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, {"feed_forward_proj": "relu"}, {"d_kv": 5, "num_heads": 3}, {"relative_attention_num_buckets": 6},
])
def test_t5_is_that_of_transformers(changes):
    fields = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4,
              "feed_forward_proj": "gated-gelu"}
    theirs = checkpoints.randomise(transformers.T5EncoderModel(transformers.T5Config(**fields | changes)), 1)
    tokens = ids(50)
    found = ours(T5Encoder, T5Config, theirs)(tokens, MASK).last_hidden_state
    expected = theirs(input_ids=tokens, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [6, 16, 32, 64])
def test_distances_of_t5_share_the_rows_that_the_published_code_gives_them(count):
    distances = torch.arange(-600, 601)
    assert torch.equal(buckets(distances, count), T5Attention._relative_position_bucket(distances, True, count, 128))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"type_vocab_size": 2, "pad_token_id": 3, "layer_norm_eps": 1e-5}])
def test_roberta_is_that_of_transformers(changes):
    fields = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
              "intermediate_size": 40, "max_position_embeddings": 20}
    config = transformers.ClapTextConfig(**fields | changes)
    theirs = checkpoints.randomise(transformers.ClapTextModel(config), 1)
    tokens = ids(50).clamp(min=4).where(MASK.bool(), torch.tensor(config.pad_token_id))
    found = ours(Roberta, RobertaConfig, theirs)(tokens, MASK)
    expected = theirs(input_ids=tokens, attention_mask=MASK)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=2e-6, rtol=1e-5)
    kept = MASK.bool()
    torch.testing.assert_close(found.last_hidden_state[kept], expected.last_hidden_state[kept], atol=5e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_inner": 50, "n_head": 2}])
def test_gpt2_is_that_of_transformers(changes):
    fields = {"vocab_size": 5, "n_positions": 20, "n_embd": 24, "n_layer": 3, "n_head": 4}
    theirs = checkpoints.randomise(transformers.GPT2Model(transformers.GPT2Config(**fields | changes)), 1)
    vectors = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    found, _ = ours(GPT2, GPT2Config, theirs)(vectors, MASK)
    expected = theirs(inputs_embeds=vectors, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("changes, rule", [
    ({"pad_token_id": -1}, "pad_token_id.*-1"), ({"pad_token_id": 50}, "pad_token_id.*50"),
    ({"num_attention_heads": 5}, "num_attention_heads.*5"), ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
    ({"hidden_act": "relu"}, "hidden_act.*relu"), ({"vocab_size": "many"}, "vocab_size.*many"),
])
def test_an_impossible_config_names_file_and_field(changes, rule):
    fields = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3} | changes
    with pytest.raises(ValueError, match=f"a file: .*{rule}"):
        read_config(RobertaConfig, fields, "a file")
