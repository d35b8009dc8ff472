"""`ldm2 eval`: numbers against oracles on transformers' embeddings, manifests, JSON, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg

import ldm2
from benchmarks.checkpoints import CAPTIONS
from ldm2 import audio
from ldm2.cli.commands import main
from ldm2.metrics import distances, embedding, evaluation
from tests.metrics.oracle import RATE, tone


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of `ldm2 eval`."""
    def call(*arguments):
        try:
            code = main(["eval", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def manifest(place, rows):
    path = place / "manifest.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def vectors(place, model):
    clap = embedding.load(str(model))
    return np.stack([clap.sound(*audio.read(path)) for path in evaluation.sound_files(place)])


def test_distances_are_those_of_the_embeddings(folder, run, tiny_checkpoint):
    made, reference = folder("made", 0, 24), folder("reference", 30, 20)
    code, out, err = run(made, "--reference", reference, "--clap", tiny_checkpoint, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    x, y = vectors(made, tiny_checkpoint), vectors(reference, tiny_checkpoint)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    score = found["scores"]["frechet_audio_distance"]
    assert score["value"] == pytest.approx(expected, abs=1e-6)
    assert (score["n"], score["n_reference"]) == (24, 20)
    assert (score["seconds"], score["seconds_reference"]) == pytest.approx((12.0, 10.0))
    assert score["embedding"] == str(tiny_checkpoint)
    assert score["revision"].startswith("sha256 ")
    assert score["resampler"].startswith("soxr ")
    assert found["scores"]["kernel_audio_distance"]["value"] == pytest.approx(distances.kernel(x, y), rel=1e-9)
    line = distances.frechet_infinity(x, y)
    assert found["scores"]["frechet_audio_distance_infinity"]["value"] == pytest.approx(line.value)
    own = [row["kernel_audio_distance"] for row in found["files"]]
    np.testing.assert_allclose(own, distances.kernel_of_points(x, y), rtol=1e-9)


def test_prompts_come_from_a_manifest_in_any_of_the_usual_words(folder, run, tiny_checkpoint):
    made = folder("made", 0, 3)
    rows = [{"path": str(made / "sound-00.wav"), "prompt": CAPTIONS[0]}, "", {"file_name": "sound-01.wav",
            "caption": CAPTIONS[1]}, {"path": "gone.wav", "status": "error"},
            {"wav": "elsewhere/sound-02.wav", "text": CAPTIONS[2]}, {"path": "of-others.wav", "prompt": "rain"}]
    code, out, _ = run(made, "--prompts", manifest(made, rows), "--clap", tiny_checkpoint, "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["prompt"] for row in found["files"]] == CAPTIONS[:3]
    clap = embedding.load(str(tiny_checkpoint))
    expected = [clap.sound(*audio.read(made / f"sound-0{number}.wav")) @ clap.texts([CAPTIONS[number]])[0]
                for number in range(3)]
    np.testing.assert_allclose([row["clap_score"] for row in found["files"]], expected, atol=1e-9)
    assert found["scores"]["clap_score"]["value"] == pytest.approx(np.mean(expected))


def test_our_own_files_bring_their_prompts_and_their_model(tmp_path, run):
    result = ldm2.generate(["a low tone", "wind"], model="tiny", steps=2, seconds=0.64, seed=0)
    result.save(tmp_path / "x.flac")
    code, out, _ = run(tmp_path, "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["prompt"] for row in found["files"]] == ["a low tone", "wind"]
    assert found["scores"]["clap_score"]["embedding"] == "tiny"
    assert found["scores"]["clap_score"]["revision"] == f"ldm2 {ldm2.__version__}"
    assert found["notes"] == ["no distances: they need --reference"]


def test_the_table_shows_each_number_with_what_it_depends_on(folder, run, tiny_checkpoint):
    made, reference = folder("made", 0, 2), folder("reference", 5, 3)
    code, out, _ = run(made, "--reference", reference, "--clap", tiny_checkpoint)
    assert code == 0
    first = out.splitlines()[0]
    assert first.startswith("frechet_audio_distance: ")
    for words in ("2 sounds, 1.0 s in all against 3 sounds, 1.5 s in all", str(tiny_checkpoint), "sha256 ", "soxr "):
        assert words in first
    assert "note: no extrapolation to infinite N: it needs 10 generated sounds" in out
    assert "note: 2 of 2 sounds have no prompt: give --prompts" in out
    assert out.splitlines()[-1].startswith(str(made / "sound-01.wav"))


def test_sounds_are_found_in_sub_folders_and_stereo_is_mixed(folder, tmp_path, tiny_checkpoint):
    made = folder("made", 0, 1)
    (made / "deep").mkdir()
    audio.write(made / "deep" / "x.wav", np.stack([tone(0), tone(0)]), RATE)
    (made / "notes.txt").write_text("not a sound")
    paths = evaluation.sound_files(made)
    assert [path.name for path in paths] == ["x.wav", "sound-00.wav"]
    report = evaluation.evaluate(paths, embedding.load(str(tiny_checkpoint)))
    np.testing.assert_allclose(report.sounds[0].vector, report.sounds[1].vector, atol=1e-6)


def test_one_sound_has_its_own_distances_only(folder, run, tiny_checkpoint):
    made, reference = folder("made", 0, 1), folder("reference", 5, 3)
    code, out, _ = run(made / "sound-00.wav", "--reference", reference, "--clap", tiny_checkpoint, "--json")
    found = json.loads(out)
    assert (code, found["scores"]) == (0, {})
    assert found["files"][0]["frechet_audio_distance"] > 0


@pytest.mark.parametrize("arguments, words", [
    (["gone"], ["no such file or folder", "gone"]),
    (["empty"], ["holds no sound file"]),
    (["made"], ["nothing to compute", "--prompts or --reference"]),
    (["made", "--reference", "gone"], ["no such file or folder"]),
    (["made", "--reference", "one"], ["a reference needs two sounds or more, got 1"]),
    (["broken", "--reference", "made"], ["broken.wav"]),
    (["made", "--prompts", "gone.jsonl"], ["gone.jsonl"]),
    (["made", "--prompts", "text.jsonl"], ["text.jsonl, line 1 is not JSON"]),
    (["made", "--prompts", "list.jsonl"], ["line 1 must be an object, got list"]),
    (["made", "--prompts", "empty.jsonl"], ["no prompt for 2 of 2 sounds", "sound-00.wav"]),
    (["made", "--prompts", "no-prompt.jsonl"], ["line 1 needs a text under one of prompt, caption, text, got 3"]),
    (["made", "--prompts", "twice.jsonl"], ["line 2: a second prompt for"]),
    (["made", "--prompts", "marked.jsonl"], ["line 1 needs a text"]),
    (["made", "--prompts", "latin.jsonl"], ["latin.jsonl is not UTF-8", "0xe9"]),
    (["made", "--reference", "made", "--clap", "audioldm3"], ["unknown model 'audioldm3'"]),
    (["made", "--reference", "made", "--clap", "some/clap", "--local-files-only"], ["some/clap is not in the cache"]),
    (["made", "--reference", "made", "--device", "abacus"], ["unknown device 'abacus'"]),
])
def test_bad_input_is_refused_in_one_line(folder, run, tmp_path, monkeypatch, arguments, words, tiny_checkpoint):
    folder("made", 0, 2)
    folder("one", 0, 1)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "broken.wav").write_bytes(b"RIFF")
    rows = {"text": "no json", "list": "[1]", "empty": "", "no-prompt": '{"path": "sound-00.wav", "prompt": 3}',
            "twice": '{"path": "sound-00.wav", "prompt": "a"}\n{"path": "sound-00.wav", "prompt": "b"}'}
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "marked.jsonl").write_text(rows["no-prompt"], encoding="utf-8-sig")
    (tmp_path / "latin.jsonl").write_bytes("caf\xe9".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedding, "DEFAULT", str(tiny_checkpoint))
    code, out, err = run(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    for word in words:
        assert word in err
