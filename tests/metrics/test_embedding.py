"""Embeddings of sounds and texts against transformers' ClapModel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import ldm2
from benchmarks.checkpoints import CAPTIONS
from ldm2.metrics import embedding
from ldm2.metrics.evaluation import evaluate, sound_files
from tests.hub import Hub
from tests.metrics.oracle import RATE, by_transformers, tone


def test_embeddings_are_those_of_transformers(clap_folder):
    clap = embedding.load(str(clap_folder))
    sounds = [tone(1), tone(2, 1.5), tone(3, 10.0)]
    audio, text = by_transformers(clap_folder, sounds, CAPTIONS[:3])
    np.testing.assert_allclose(np.stack([clap.sound(sound, RATE) for sound in sounds]), audio, atol=1e-5)
    np.testing.assert_allclose(clap.texts(CAPTIONS[:3]), text, atol=1e-5)


def test_clap_scores_are_those_of_transformers(clap_folder, folder):
    paths = sound_files(folder("made", 0, 3))
    prompts = dict(zip(paths, CAPTIONS))
    report = evaluate(paths, embedding.load(str(clap_folder)), prompts=prompts)
    audio, text = by_transformers(clap_folder, [tone(number) for number in range(3)], CAPTIONS[:3])
    cosines = (audio * text).sum(axis=1)                                     # of 16 bit files
    np.testing.assert_allclose([sound.clap_score for sound in report.sounds], cosines, atol=2e-4)
    [score] = report.scores
    own = np.array([sound.clap_score for sound in report.sounds])
    assert score.value == pytest.approx(own.mean())
    assert score.more["standard_error"] == pytest.approx(own.std(ddof=1) / 3**0.5)


def test_scores_of_files_that_keep_every_sample_agree_to_1e_5(clap_folder, folder):
    paths = sound_files(folder("made", 0, 2, encoding="float32"))
    report = evaluate(paths, embedding.load(str(clap_folder)), prompts=dict.fromkeys(paths, CAPTIONS[0]))
    audio, text = by_transformers(clap_folder, [tone(0), tone(1)], CAPTIONS[:1])
    np.testing.assert_allclose([sound.clap_score for sound in report.sounds], (audio @ text.T)[:, 0], atol=1e-5)


def test_a_long_sound_is_the_mean_direction_of_its_pieces(tiny_checkpoint):
    clap = embedding.load(str(tiny_checkpoint))
    first, second = tone(4, 10.0), tone(5, 2.0)
    whole = np.concatenate([first, second])
    pieces = np.stack([clap.sound(first, RATE), clap.sound(second, RATE)])
    mean = pieces.mean(axis=0)
    np.testing.assert_allclose(clap.sound(whole, RATE), mean / np.linalg.norm(mean), atol=1e-3)   # the border rings
    # 10.24 s: what is left is too short to be a piece
    np.testing.assert_allclose(clap.sound(whole[: round(10.24 * RATE)], RATE), pieces[0], atol=1e-4)


def test_nothing_is_drawn(clap_folder):
    state = np.random.get_state()[1].copy()
    clap = embedding.load(str(clap_folder))
    assert np.array_equal(clap.sound(tone(1, 11.5), RATE), clap.sound(tone(1, 11.5), RATE))
    assert np.array_equal(state, np.random.get_state()[1])


def test_each_kind_of_model_says_which_it_is(tiny_checkpoint, clap_folder):
    assert embedding.load("tiny").revision == f"ldm2 {ldm2.__version__}"
    first, second = embedding.load(str(tiny_checkpoint)), embedding.load(str(clap_folder))
    assert first.revision.startswith("sha256 ")
    assert first.revision != second.revision
    assert first.resampler.startswith("soxr ")


@pytest.mark.parametrize("clap_folder", [False], ids=["plain"], indirect=True)
def test_a_clapmodel_is_fetched_by_its_name_and_then_works_offline(clap_folder, tmp_path):
    code = ("import sys, json; from ldm2.metrics import embedding; from tests.metrics.oracle import tone\n"
            "for word in sys.stdin:\n"
            "    clap = embedding.load('somebody/clap', local_files_only=word.strip() == 'here')\n"
            "    print(json.dumps([clap.revision, clap.sound(tone(1), 16000).tolist()]), flush=True)")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with Hub() as hub:
        commit = hub.add("somebody/clap", clap_folder)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code], env=clean | settings, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)

        def ask(word):
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        revision, vector = ask("fetch")
        assert revision == commit
        np.testing.assert_allclose(vector, embedding.load(str(clap_folder)).sound(tone(1), RATE), atol=1e-6)
        hub.requests.clear()
        assert ask("here") == [revision, vector]
        assert hub.requests == []
        process.communicate()


@pytest.mark.parametrize("spoil, words", [
    (lambda place: (place / "config.json").write_text('{"model_type": "bert"}'), "no ClapModel: .*'bert'"),
    (lambda place: (place / "config.json").write_text("{"), "config.json: not valid JSON"),
    (lambda place: (place / "preprocessor_config.json").unlink(), "is not complete: it needs preprocessor_config"),
    (lambda place: (place / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
])
def test_a_folder_that_is_no_clapmodel_says_why(clap_folder, tmp_path, spoil, words):
    place = tmp_path / "copy"
    shutil.copytree(clap_folder, place)
    spoil(place)
    with pytest.raises(ValueError, match=words):
        embedding.load(str(place))
