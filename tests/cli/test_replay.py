"""A sound made again from its file: `ldm2 replay`, `generate --settings`, `info` of a sound, Settings.from_file."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import soundfile

import ldm2
from ldm2 import audio
from tests.helpers import tone

MADE = ("--model", "tiny", "--steps", "2", "--seconds", "0.4", "--seed", "5", "-q")


def comment(path) -> dict:
    return json.loads(audio.read_metadata(path)["comment"])


@pytest.mark.parametrize("name, form", [
    ("a.flac", ()), ("a.wav", ()), ("a.wav", ("--subtype", "FLOAT")), ("a.flac", ("--normalize", "-20")),
    ("a.wav", ("--sample-rate", "22050", "--trim")),
])
def test_a_replay_has_the_samples_of_the_file(run, name, form):
    assert run("generate", "a rising sweep", *MADE, *form, "-o", name)[0] == 0
    assert run("replay", name, "-q", "-o", f"again-{name}")[0] == 0
    old, new = (soundfile.read(each, dtype="float64") for each in (name, f"again-{name}"))
    assert old[1] == new[1] and np.array_equal(old[0], new[0])
    code, out, _ = run("replay", name, "--check", "-q")
    assert code == 0 and out.startswith("equal: all ")


def test_a_check_writes_nothing_and_tells_how_far_and_what_differs(run, tmp_path):
    run("generate", "a rising sweep", *MADE, "-o", "a.wav")
    samples, rate = audio.read_channels("a.wav")
    changed = samples.copy()
    changed[0, 100:103] += 0.125
    told = comment("a.wav") | {"ldm2": "0.0.1", "device": "cuda"}
    audio.write("a.wav", changed, rate, overwrite=True, metadata={"comment": json.dumps(told)})
    before = sorted(tmp_path.iterdir())
    code, out, _ = run("replay", "a.wav", "--check", "-q")
    assert code == 1 and sorted(tmp_path.iterdir()) == before
    assert "3 of 6400 samples, by 0.125 at most" in out
    assert "ldm2 was 0.0.1, is " in out and "device was cuda, is cpu" in out and "dtype was" not in out


def test_set_changes_what_it_names_and_nothing_else(run):
    run("generate", "a rising sweep", *MADE, "-o", "a.flac")
    run("replay", "a.flac", "-q", "-o", "b.flac", "--set", "steps=1", "--set", "guidance-scale=3", "--set", "reuse=2")
    old, new = comment("a.flac"), comment("b.flac")
    assert {name: new[name] for name in new if new[name] != old[name]} == {
        "steps": 1, "guidance_scale": 3.0, "cache_interval": 2}


def test_a_preset_replaces_recorded_values(run):
    run("generate", "a rising sweep", *MADE, "-o", "a.flac")
    run("replay", "a.flac", "-q", "-o", "b.flac", "--set", "preset=fast", "--set", "steps=2")
    assert {name: comment("b.flac")[name] for name in ("steps", "sampler", "spacing")} == {
        "steps": 2, "sampler": "dpmpp-2m", "spacing": "trailing"}


@pytest.mark.parametrize("arguments", [
    ("transfer", "in.wav", "a rising sweep", "--strength", "0.5"),
    ("inpaint", "in.wav", "a rising sweep", "--time", "0.1:0.2", "--band", "500:2000", "--soft-hz", "100"),
    ("extend", "in.wav", "--seconds", "0.2", "--side", "both", "--keep-format"),
    ("super-resolution", "in.wav", "--above", "2000"), ("variations", "in.wav", "--num-waveforms", "1"),
])
def test_edits_replay(run, arguments):
    audio.write("in.wav", tone(0.4, 8000), 8000)
    assert run(*arguments, "--model", "tiny", "--steps", "2", "--seed", "3", "-q", "-o", "out.wav")[0] == 0
    assert run("replay", "out.wav", "--check", "-q")[:2] == (0, f"equal: all {audio.describe('out.wav').num_samples} "
                                                               "samples are those of out.wav\n")


def test_a_changed_and_a_missing_input_are_refused(run, tmp_path):
    audio.write("in.wav", tone(0.4), 16_000)
    run("transfer", "in.wav", "a rising sweep", "--model", "tiny", "--steps", "2", "-q", "-o", "out.wav")
    audio.write("moved.wav", tone(0.4), 16_000)
    audio.write("in.wav", tone(0.4, hz=300), 16_000, overwrite=True)
    code, _, err = run("replay", "out.wav", "-q", "-o", "b.wav")
    assert code == 2 and "in.wav has changed: its SHA-256" in err
    (tmp_path / "in.wav").unlink()
    code, _, err = run("replay", "out.wav", "-q", "-o", "b.wav")
    assert code == 2 and "in.wav is missing" in err and not (tmp_path / "b.wav").exists()
    assert run("replay", "out.wav", "--check", "-q", "--set", "input=moved.wav")[0] == 0


@pytest.mark.parametrize("name, text, words", [
    ("a.json", "[1]", "must hold options by their names, got list"), ("a.json", "{", "a.json is not JSON"),
    ("a.json", '{"prompt": "x", "step": 3}', "no option 'step', did you mean steps"),
    ("a.json", '{"prompt": "x", "steps": "3"}', "a.json: steps must be a positive integer, got '3'"),
    ("a.json", '{"task": "dance"}', "unknown task 'dance'"), ("a.json", '{"task": ["x"]}', "unknown task ['x']"),
    ("a.toml", "prompt = ", "a.toml is not TOML"), ("a.json", "[" * 100_000, "a.json"),
])
def test_a_file_of_settings_is_refused_in_one_line(run, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as refusal:
        ldm2.Settings.from_file(name)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    code, _, err = run("generate", "--settings", name, "--model", "tiny")
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
@pytest.mark.parametrize("name", ["a.json", "a.toml", "a.wav"])
def test_a_pipe_in_place_of_settings_is_refused(run, tmp_path, name):
    os.mkfifo(tmp_path / name)                             # a read of it would wait for ever
    code, _, err = run("generate", "rain", "--model", "tiny", "--settings", name)
    assert code == 2 and err == f"ldm2: error: {name} is not a file\n"


def test_a_sound_of_another_program_is_refused(run):
    audio.write("a.wav", tone(0.1), 16_000, metadata={"software": "Audacity", "comment": "mine"})
    code, _, err = run("replay", "a.wav")
    assert code == 2 and err.startswith("ldm2: error: a.wav ") and "Audacity" in err and err.count("\n") == 1
    code, out, _ = run("info", "a.wav")
    assert code == 0 and "none of ldm2" in out and "16000 Hz" in out and "0.100 s (1600 samples)" in out


def test_info_prints_what_a_sound_holds(run):
    run("generate", "a rising sweep", *MADE, "-o", "a.flac")
    out = run("info", "a.flac")[1]
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(("made by", "sample")))
    assert lines["prompt"] == "a rising sweep" and lines["seed"] == "5" and lines["model"] == "tiny"


@pytest.mark.parametrize("name, text", [
    ("a.toml", 'prompt = "a rising sweep"\nsteps = 2\nseconds = 0.4\nseed = 5\nmodel = "tiny"\n'),
    ("a.json", '{"prompt": "a rising sweep", "steps": 2, "seconds": 0.4, "seed": 5, "model": "tiny"}'),
])
def test_generate_takes_a_file_of_settings(run, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert run("generate", "--settings", name, "-q", "-o", "a.wav")[0] == 0
    run("generate", "a rising sweep", *MADE, "-o", "b.wav")
    assert soundfile.read("a.wav")[0].tolist() == soundfile.read("b.wav")[0].tolist()
    run("generate", "--settings", name, "--seed", "6", "-q", "-o", "c.wav")
    assert comment("c.wav") == comment("a.wav") | {"seed": 6}


def test_files_of_version_0_1_0_are_read(run):
    old = {"prompt": "a rising sweep", "negative_prompt": None, "seconds": 0.4, "steps": 2, "guidance_scale": 3.5,
           "sampler": "ddim", "eta": 0.0, "seed": 5, "num_waveforms": 1, "loop": False, "prompt_at": [],
           "guidance_interval": [0.0, 1.0], "reuse": 2, "spacing": None, "model": "tiny", "revision": None,
           "reference": "authors", "dtype": "float32", "ldm2": "0.1.0"}
    audio.write("old.wav", tone(0.4), 16_000, metadata={"comment": json.dumps(old)})
    assert ldm2.Settings.from_file("old.wav") == ldm2.Settings(
        "a rising sweep", seconds=0.4, steps=2, guidance_scale=3.5, sampler="ddim", seed=5, num_waveforms=1,
        guidance_interval=(0, 1), cache_interval=2)
    edit = {"task": "extend", "extension": 0.2, "side": "after", "crossfade": 0.02, "paste": True, "channel": None,
            "keep_format": False, "input": "in.wav"}
    audio.write("in.wav", tone(0.4), 16_000)
    audio.write("edit.wav", tone(0.6), 16_000, metadata={"comment": json.dumps(
        old | {"prompt": "", "guidance_scale": 1.0, "edit": edit})})
    settings = ldm2.Settings.from_file("edit.wav")
    assert (settings.task, settings.seconds, settings.prompt) == ("extend", 0.2, None)
    code, out, _ = run("replay", "edit.wav", "--check", "-q")
    assert code == 1 and "the file does not state its torch, device" in out
