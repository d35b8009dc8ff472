"""The trade-off script: what it compares, counts and writes. Its numbers are those of a trained model only."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

import ldm2
from benchmarks import tradeoff
from benchmarks.tradeoff import Comparison, Row, calls_of, name_of, operations, pareto, ways
from ldm2.metrics import distances, embedding
from ldm2.samplers import SAMPLERS
from ldm2.settings import PRESETS, Sampling
from ldm2.training.tiny.sounds import make_waveform
from ldm2.unet import UNet

REFERENCE = tradeoff.REFERENCE | {"steps": 6}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint)
    pipe.defaults["seconds"] = 0.16
    return pipe


@pytest.fixture(scope="module")
def comparison(pipe):
    """Two kinds of sound, one of each, six steps as the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tradeoff, "REFERENCE", REFERENCE)
        yield Comparison(pipe, prompts=2, seeds=1, judged=False)


def row(seconds, mel, name="x"):
    return Row(name, "ddim", REFERENCE, seconds, work=1.0, branches=1.0, latents=mel, mel=mel, right=None)


def test_the_reference_is_what_is_made_without_any_option():
    plain = Sampling().resolved()
    assert {name: getattr(plain, name) for name in tradeoff.REFERENCE} == tradeoff.REFERENCE


def test_all_samplers_and_presets_are_compared_and_nothing_twice():
    compared = ways()
    assert {kind for kind, _ in compared} >= set(SAMPLERS) | {f"preset {name}" for name in PRESETS}
    names = [name_of(settings) for _, settings in compared]
    assert len(names) == len(set(names))


def test_ways_that_differ_in_spacing_alone_are_compared():
    settings = [settings for _, settings in ways()]
    for sampler in tradeoff.TRAILING:
        own = tradeoff.REFERENCE | {"sampler": sampler, "steps": 20}
        assert own in settings and own | {"spacing": "trailing"} in settings


def test_the_reference_is_at_no_distance_from_itself(comparison):
    same = comparison.row("ddim", REFERENCE)
    assert (same.latents, same.mel, same.work, same.branches, same.right) == (0, 0, 1, 12, None)


def test_a_way_starts_from_the_noise_of_the_reference(comparison):
    again = comparison.row("ddim", REFERENCE | {"guidance_interval": (0, 0.9999)})
    assert (again.latents, again.mel) == (0, 0)


def test_branches_and_work_are_those_of_the_calls_that_were_made(comparison):
    half = comparison.row("ddim", REFERENCE | {"guidance_interval": (0.0, 0.5)})
    assert half.branches == 2 * 2 + 4                      # the timesteps 831 and 665 of 831, 665, 499, 333, 167, 1
    assert half.work == pytest.approx((2 + 4 * operations()[1, True] / operations()[2, True]) / 6)
    reused = comparison.row("ddim", REFERENCE | {"cache_interval": 3})
    assert reused.branches == 12
    assert reused.work == pytest.approx((2 + 4 * operations()[2, False] / operations()[2, True]) / 6)
    assert half.latents > 0 and reused.latents > 0


def test_the_first_level_is_a_small_part_of_the_published_model():
    counts = operations()
    assert 1.8 < counts[2, True] / counts[1, True] < 2
    assert all(counts[branches, False] < 0.12 * counts[branches, True] for branches in (1, 2))


@pytest.mark.parametrize("settings, calls", [
    ({}, {(2, True): 6}),
    ({"sampler": "heun"}, {(2, True): 11}),
    ({"guidance_interval": (0.0, 0.5)}, {(2, True): 2, (1, True): 4}),
    ({"cache_interval": 3}, {(2, True): 2, (2, False): 4}),
    ({"sampler": "dpmpp-2m-sde", "guidance_interval": (0.0, 0.5), "cache_interval": 2},
     {(2, True): 2, (2, False): 1, (1, True): 2, (1, False): 1}),
])
def test_calls_are_counted_by_branches_and_depth(pipe, settings, calls):
    unet = pipe.unet
    assert calls_of(pipe, REFERENCE | settings) == calls
    assert pipe.unet is unet


@pytest.mark.parametrize("settings", [{"sampler": "heun"}, {"guidance_interval": (0.3, 0.8), "cache_interval": 2}])
def test_the_counted_calls_are_those_that_the_unet_gets(pipe, monkeypatch, settings):
    made = Counter()
    forward_cached = UNet.forward_cached

    def watched(self, x_t, t, conditioning, time=None, features=None):
        made[conditioning.rows // len(x_t), features is None] += 1
        return forward_cached(self, x_t, t, conditioning, time, features)

    monkeypatch.setattr(UNet, "forward_cached", watched)
    pipe.generate("x", seed=0, **REFERENCE | settings)
    assert made == calls_of(pipe, REFERENCE | settings)


def test_sounds_are_the_same_whatever_the_batch(comparison, monkeypatch):
    whole, _ = comparison.run(REFERENCE)
    monkeypatch.setattr(tradeoff, "AT_ONCE", 1)
    torch.testing.assert_close(comparison.run(REFERENCE)[0], whole, rtol=1e-4, atol=1e-4)


def test_a_way_with_a_lora_is_named_and_counted_without_guidance(pipe):
    instant = tradeoff.REFERENCE | PRESETS["instant"]
    assert name_of(instant) == "ddim 4, trailing, LoRA instant"
    assert calls_of(pipe, instant) == {(1, True): 4}


def test_a_way_in_another_dtype_is_near_the_same_in_float32(comparison):
    half, same = (comparison.row("dtype", REFERENCE | {"dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert 0 < half.latents < 0.2 and same.latents < 1e-5
    assert half.branches == 12 and half.name == "ddim 6, bfloat16"


def test_the_judge_hears_what_was_asked_for(comparison, monkeypatch):
    rng = np.random.default_rng(0)
    right = [make_waveform(rng, kind) for kind in comparison.kinds]
    assert comparison.right(np.stack([right[0], 0 * right[1]])) == 0.5


def test_a_way_is_scored_by_the_embeddings_of_its_sounds(pipe, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(tradeoff, "REFERENCE", REFERENCE)
    clap = embedding.load(str(tiny_checkpoint))
    scored = Comparison(pipe, prompts=2, seeds=2, judged=False, embedding=clap)
    same = scored.row("ddim", REFERENCE)
    assert same.frechet == pytest.approx(0, abs=1e-12)
    other = scored.row("ddim", REFERENCE | {"steps": 1})
    sounds = pipe.vocode(pipe.decode(scored.run(other.settings)[0])).numpy()
    x = np.stack([clap.sound(sound, 16_000) for sound in sounds])
    y = np.stack([clap.sound(sound, 16_000) for sound in pipe.vocode(scored.reference_mel).numpy()])
    assert other.frechet == pytest.approx(distances.frechet(x, y), rel=1e-6)
    assert other.kernel == pytest.approx(distances.kernel(x, y), rel=1e-6)
    texts = [tradeoff.PROMPTS[kind][0] for kind in scored.kinds]
    assert other.clap == pytest.approx((x * clap.texts(texts)).sum(axis=1).mean(), rel=1e-6)


def test_the_pareto_curve_holds_what_nothing_beats():
    rows = [row(3, 0.1), row(1, 0.5), row(2, 0.5), row(2, 0.2), row(4, 0.3)]
    assert [(r.seconds, r.mel) for r in pareto(rows)] == [(1, 0.5), (2, 0.2), (3, 0.1)]


def test_the_script_prints_a_table_and_writes_json_markdown_and_a_picture(
    pipe, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tradeoff, "REFERENCE", REFERENCE)
    monkeypatch.setattr(tradeoff, "STEPS", (1,))
    monkeypatch.setattr(tradeoff, "INTERVALS", ((0.0, 0.5),))
    monkeypatch.setattr(tradeoff, "PRESETS", PRESETS | {"fast": PRESETS["fast"] | {"steps": 2}})
    monkeypatch.setattr(ldm2, "load", lambda *arguments, **options: pipe)
    out, plot = tmp_path / "results" / "tradeoff", tmp_path / "results" / "tradeoff.png"
    tradeoff.main(["--prompts", "1", "--seeds", "2", "--no-judge", "--model", str(tiny_checkpoint),
                   "--out", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    content = json.loads(out.with_suffix(".json").read_text())
    assert [content["rows"][i]["kind"] for i in (0, -1)] == ["reference", "preset fast"]
    assert all(np.isfinite(r["mel"]) and r["seconds"] > 0 for r in content["rows"])
    assert content["torch"] == torch.__version__ and content["sounds"] == 2
    assert content["embedding"] == str(tiny_checkpoint)
    assert all(np.isfinite(r["frechet"]) for r in content["rows"])
    assert printed.strip() in out.with_suffix(".md").read_text()
    assert plot.stat().st_size > 10_000
