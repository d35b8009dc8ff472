"""CLAP similarity, against transformers' own scores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from benchmarks import checkpoints
from benchmarks.checkpoints import CAPTIONS
from ldm2.audio import resample
from ldm2.checkpoints import build
from ldm2.checkpoints.reading import read_hub_folder
from ldm2.text.ranking import FEATURE_EXTRACTOR, ClapAudio, Ranker, best_first

RATE = 16_000


@pytest.fixture(scope="module")
def ranker(tiny_checkpoint):
    return build.ranker(read_hub_folder(tiny_checkpoint))


@pytest.fixture(scope="module")
def sounds():
    """Four sounds of one second: noise, fading noise, a tone, clicks."""
    noise = np.random.default_rng(0).standard_normal(RATE) * 0.1
    time = np.arange(RATE) / RATE
    return np.stack([noise, noise * time, 0.5 * np.sin(2 * np.pi * 440 * time), (time % 0.1 < 1e-3)]).astype(np.float32)


@torch.no_grad()
def test_scores_equal_transformers(tiny_checkpoint, ranker, sounds):
    model = transformers.ClapModel.from_pretrained(tiny_checkpoint / "text_encoder")
    extractor = transformers.ClapFeatureExtractor.from_pretrained(tiny_checkpoint / "feature_extractor")
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    audio = extractor(list(resample(sounds, RATE, 48_000)), sampling_rate=48_000, return_tensors="pt")
    output = model(**tokenizer(CAPTIONS[:2], padding=True, return_tensors="pt"), **audio)
    cosines = output.text_embeds @ output.audio_embeds.T                         # (2, 4)
    scores = ranker.scores(CAPTIONS[:2], sounds, RATE)
    torch.testing.assert_close(scores, torch.stack([cosines[0, :2], cosines[1, 2:]]), atol=1e-6, rtol=0)


def test_scores_do_not_depend_on_the_other_sounds(ranker, sounds):
    together = ranker.scores(["rain"], sounds, RATE)
    alone = torch.cat([ranker.scores(["rain"], sound[None], RATE) for sound in sounds], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_of_a_long_sound_the_first_seconds_count_each_time(ranker):
    long = np.random.default_rng(0).standard_normal((1, 12 * RATE)).astype(np.float32) * np.linspace(0, 1, 12 * RATE)
    state = np.random.get_state()[1].copy()
    first = ranker.scores(["rain"], long, RATE)
    assert torch.equal(first, ranker.scores(["rain"], long, RATE))
    torch.testing.assert_close(first, ranker.scores(["rain"], long[:, : 11 * RATE], RATE), atol=1e-6, rtol=0)
    assert np.array_equal(state, np.random.get_state()[1])


def test_extractor_saved_for_fusion_is_not_random_either(ranker, sounds):
    fusion = transformers.ClapFeatureExtractor(feature_size=16, hop_length=1920, truncation="fusion")
    rand_trunc = transformers.ClapFeatureExtractor(feature_size=16, hop_length=1920, truncation="rand_trunc")
    scores = []
    for extractor in (fusion, rand_trunc):
        model = checkpoints.clap()
        audio = ClapAudio.load(model.config.to_dict(), dict(model.state_dict()), extractor)
        scores.append(Ranker(ranker.text, audio).scores(["rain"], sounds, RATE))
    assert torch.equal(*scores)


def test_best_candidate_comes_first_and_prompts_stay_apart():
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.7, 0.8]])
    assert best_first(scores) == [1, 2, 0, 3, 5, 4]


def test_equal_candidates_keep_their_order():
    assert best_first(torch.zeros(2, 3)) == [0, 1, 2, 3, 4, 5]


def test_tensors_are_taken_as_well_as_arrays(ranker, sounds):
    assert torch.equal(ranker.scores(["rain"], torch.from_numpy(sounds), RATE), ranker.scores(["rain"], sounds, RATE))


def test_text_branch_of_the_encoder_is_shared(tiny_checkpoint, ranker, sounds):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint))
    sharing = build.ranker(read_hub_folder(tiny_checkpoint), encoder.clap)
    assert sharing.text is encoder.clap
    assert torch.equal(sharing.scores(["rain"], sounds, RATE), ranker.scores(["rain"], sounds, RATE))


def test_half_precision_text_branch_can_be_shared(tiny_checkpoint, ranker, sounds):
    encoder = build.text_encoder(read_hub_folder(tiny_checkpoint), dtype=torch.bfloat16)
    scores = build.ranker(read_hub_folder(tiny_checkpoint), encoder.clap).scores(["rain"], sounds, RATE)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, ranker.scores(["rain"], sounds, RATE), atol=0.02, rtol=0)


def test_audio_branch_loads_without_tables_of_relative_positions(ranker, sounds):
    model = checkpoints.clap()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "relative_position_index" not in name}
    audio = ClapAudio.load(model.config.to_dict(), tensors, checkpoints.feature_extractor())
    expected = ranker.audio(sounds, RATE)
    assert torch.equal(audio(sounds, RATE), expected)


@pytest.mark.parametrize("shape", [(3, 100), (2, 0), (100,)])
def test_waveforms_that_do_not_fit_the_prompts_are_an_error(ranker, shape):
    with pytest.raises(ValueError, match="2 prompts need waveforms of shape"):
        ranker.scores(["rain", "a dog"], np.zeros(shape, np.float32), RATE)


def test_checkpoint_without_audio_branch_cannot_rank(tiny_checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"feature_extractor": [None, None]}))
    with pytest.raises(ValueError, match="this checkpoint cannot rank"):
        build.ranker(read_hub_folder(folder))


def test_missing_audio_weight_is_named():
    model = checkpoints.clap()
    tensors = dict(model.state_dict())
    del tensors["audio_projection.linear1.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(audio_projection\.linear1\.bias\)"):
        ClapAudio.load(model.config.to_dict(), tensors, checkpoints.feature_extractor())


def test_published_front_end_hears_ten_seconds_at_48_khz():
    extractor = transformers.ClapFeatureExtractor(**FEATURE_EXTRACTOR)
    features = extractor([np.zeros(480_000, np.float32)], sampling_rate=48_000, return_tensors="pt")["input_features"]
    assert features.shape == (1, 1, 1001, 64)
