"""The commands that take a sound: what is written, printed and refused. One runs as a subprocess, the others here."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import ldm2
from ldm2 import audio
from ldm2.cli.commands import main
from ldm2.settings import PRESETS
from tests.helpers import ROOT, run_ldm2

RATE = 16_000
ONE = ("--steps", 1, "--seed", 1)
SOUND = (0.1 * np.random.default_rng(0).standard_normal((11_025, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint)


@pytest.fixture
def run(pipe, tmp_path, monkeypatch, capsys):
    """Run `ldm2 ARGUMENTS` in a folder with the stereo file in.wav: (exit code, lines of stdout, lines of stderr)."""
    soundfile.write(tmp_path / "in.wav", SOUND, 22_050, subtype="PCM_24")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm2, "load", lambda *arguments, **options: pipe)

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return call


def read(path):
    return soundfile.read(path, always_2d=True)[0]


def test_inpaint_as_a_process_keeps_what_it_was_not_to_change(tiny_checkpoint, tmp_path):
    soundfile.write(tmp_path / "in.wav", SOUND, 22_050, subtype="PCM_24")
    before = (tmp_path / "in.wav").read_bytes()
    done = run_ldm2("inpaint", "in.wav", "rain", "--time", "0.1:0.2", "--time", "0.4:", "--keep-format", "-o",
                       "out.wav", "--model", tiny_checkpoint, *ONE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["out.wav"]
    old, new = read(tmp_path / "in.wav"), read(tmp_path / "out.wav")
    assert np.array_equal(new[:2205], old[:2205]) and np.array_equal(new[4410:8820], old[4410:8820])
    assert (new[2300:4300] != old[2300:4300]).mean() > 0.9
    assert soundfile.info(tmp_path / "out.wav").subtype == "PCM_24"
    assert (tmp_path / "in.wav").read_bytes() == before


@pytest.mark.parametrize("arguments, name, seconds", [
    (("transfer", "in.wav", "rain", "--strength", 0.7), "in-transfer.wav", 0.5),
    (("inpaint", "in.wav", "rain", "--band", "2000:4000"), "in-inpaint.wav", 0.5),
    (("extend", "in.wav", "rain", "--seconds", 0.2, "--side", "both"), "in-extend.wav", 0.9),
    (("super-resolution", "in.wav", "--above", 4000), "in-super-resolution.wav", 0.5),
    (("variations", "in.wav", "--num-waveforms", 1), "in-variations.wav", 0.5),
])
@pytest.mark.usefixtures("bfloat16_instructions")
def test_each_edit_names_its_file_after_the_input(run, tmp_path, arguments, name, seconds):
    code, out, err = run(*arguments, *ONE)
    assert (code, out) == (0, [name]), err
    wrote, = (line for line in err if line.startswith("wrote "))
    assert f"{seconds:.2f} s at 16000 Hz" in wrote and "seed 1" in wrote
    assert read(tmp_path / name).shape == (round(seconds * RATE), 1)
    task = json.loads(audio.read_metadata(tmp_path / name)["comment"])["task"]
    assert task == arguments[0].replace("-", "_")


def test_an_edit_takes_the_fast_options(run, tmp_path):
    code, out, err = run("transfer", "in.wav", "rain", "--preset", "fast", "--reuse", 2, "--spacing", "linspace", *ONE)
    assert (code, out) == (0, ["in-transfer.wav"]), err
    settings = json.loads(audio.read_metadata(tmp_path / out[0])["comment"])
    assert (settings["steps"], settings["cache_interval"], settings["sampler"]) == (1, 2, PRESETS["fast"]["sampler"])
    assert settings["spacing"] == "linspace"


def test_variations_are_three_unless_asked_otherwise(run, tmp_path):
    code, out, err = run("variations", "in.wav", "-o", "x.flac", *ONE)
    assert (code, out) == (0, ["x-1.flac", "x-2.flac", "x-3.flac"]), err


@pytest.mark.parametrize("stage", ["vocoder", "vae", "diffusion"])
def test_reconstruct_prints_the_distances_and_draws_them(run, tmp_path, stage):
    code, out, err = run("reconstruct", "in.wav", "-o", "x.wav", "--stage", stage, "--plot", "x.png",
                         *(ONE if stage == "diffusion" else ()))
    assert code == 0, err
    assert [line.split("  ")[0] for line in out[:4]] == [
        "log mel distance", "spectral convergence", "multi resolution stft", "level difference"
    ]
    assert out[3].endswith("dB") and out[-1] == "x.wav"
    assert read(tmp_path / "x.wav").shape == (8000, 1)
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments, words", [
    (("transfer", "none.wav", "x"), ("none.wav", "does not exist")),
    (("transfer", "text.wav", "x"), ("text.wav", "cannot be read as a sound file")),
    (("transfer", "nan.wav", "x"), ("nan.wav", "NaN or infinite")),
    (("transfer", "in.wav", "x", "--strength", 1.5), ("strength", "0 to 1", "1.5")),
    (("transfer", "in.wav", "x", "-o", "in.wav", "--overwrite"), ("in.wav is the input",)),
    (("transfer", "in.wav", "x", "-o", "x.mp4"), (".mp4",)),
    (("transfer", "in.wav", "x", "--channel", 2), ("channel", "2")),
    (("transfer", "in.wav", "", "--steps", 1), ("empty",)),
    (("transfer", "six.wav", "x", "--keep-format", "-o", "x.mp3"), ("1 to 2 channels", "6")),
    (("variations", "in.wav", "--guidance-scale", 3), ("guidance_scale", "needs a prompt")),
    (("inpaint", "in.wav", "x"), ("--time", "--band")),
    (("inpaint", "in.wav", "x", "--time", "0.3:0.2"), ("0.3:0.2 s", "must end after it begins")),
    (("inpaint", "in.wav", "x", "--time", "0.2:9"), ("0.2:9 s", "not within 0:0.5 s")),
    (("inpaint", "in.wav", "x", "--time", "soon"), ("FROM:TO", "soon")),
    (("inpaint", "in.wav", "x", "--band", "1000:9000"), ("1000:9000 Hz", "not within")),
    (("extend", "in.wav", "x", "--seconds", -1), ("seconds", "-1")),
    (("extend", "in.wav", "x", "--side", "above"), ("above", "after")),
    (("super-resolution", "in.wav", "--above", 9000), ("above must be below 8000 Hz", "9000")),
    (("super-resolution", "in.wav", "--above", "nan"), ("above must be a finite number of at least 0",)),
    (("super-resolution", "in.wav", "--above", 4000, "--soft-hz", -1), ("soft_hz",)),
    (("transfer", "rain", "in.wav"), ("rain does not exist", "in.wav does", "the file comes first")),
    (("transfer", "fast.wav", "x", "--keep-format", "-o", "x.mp3"), (".mp3", "96000")),
    (("transfer", "long.wav", "x"), ("600 s", "601 s")),
    (("extend", "in.wav", "x", "--seconds", 300, "--side", "both"), ("600 s", "600.5 s")),
    (("extend", "in.wav", "x", "--crossfade", -1), ("crossfade must be", "-1")),
    (("inpaint", "in.wav", "x", "--time", ":0.1", "--soft-hz", "nan"), ("soft_hz must be", "nan")),
    (("transfer", "in.wav", "x", "--prompt-at", "0.7:y"), ("inside the 0.5 seconds",)),
    (("super-resolution", "in.wav"), ("--above",)),
    (("reconstruct", "in.wav", "--stage", "text"), ("text", "vocoder")),
    (("reconstruct", "in.wav", "--plot", "x.jpg"), (".png", "x.jpg")),
])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(run, tmp_path, arguments, words):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "six.wav", np.zeros((1000, 6)), RATE)
    soundfile.write(tmp_path / "fast.wav", np.zeros(1000), 96_000)
    soundfile.write(tmp_path / "long.wav", np.zeros(601), 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1), err
    for word in words:
        assert word in err[0]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("arguments", [
    ("transfer", "in.wav", "x", "--strength", 2), ("transfer", "in.wav", "x", "--keep-format", "-o", "x.opus"),
    ("extend", "in.wav", "x", "--seconds", 0), ("extend", "in.wav", "x", "--crossfade", -1),
    ("inpaint", "in.wav", "x", "--time", ":9"), ("inpaint", "in.wav", "x", "--band", ":9", "--soft-seconds", -1),
    ("super-resolution", "in.wav", "--above", -1), ("reconstruct", "in.wav", "--plot", "x.jpg"),
    ("transfer", "in.wav", "x", "--subtype", "FLOAT", "-o", "x.flac"),
    ("reconstruct", "in.wav", "--sample-rate", 44_100, "-o", "x.opus"),
    ("extend", "in.wav", "x", "--seconds", 0.5, "--prompt-at", "1.5:y"),
])
def test_what_needs_no_model_is_refused_before_one_is_loaded(run, monkeypatch, arguments):
    monkeypatch.setattr(ldm2, "load", None)
    assert run(*arguments)[0] == 2


def test_prompts_change_over_the_time_of_an_edit(run, tmp_path):
    code, _, err = run("transfer", "in.wav", "rain", "--prompt-at", "0.2:thunder", "-o", "x.wav", *ONE)
    assert code == 0, err
    assert json.loads(audio.read_metadata(tmp_path / "x.wav")["comment"])["prompt_at"] == [[0.2, "thunder"]]


def test_a_prompt_may_change_in_what_an_extension_adds(run, tmp_path):
    code, _, err = run("extend", "in.wav", "rain", "--seconds", 0.3, "--side", "both", "--prompt-at", "0.9:thunder",
                       "-o", "x.wav", *ONE)
    assert code == 0, err
    assert json.loads(audio.read_metadata(tmp_path / "x.wav")["comment"])["prompt_at"] == [[0.9, "thunder"]]


def test_reconstruct_on_stdout_is_the_file_and_nothing_else(tiny_checkpoint, tmp_path):
    soundfile.write(tmp_path / "in.wav", SOUND, 22_050, subtype="PCM_24")
    arguments = ("reconstruct", "in.wav", "--model", tiny_checkpoint, "-o")
    assert run_ldm2(*arguments, "x.wav", cwd=tmp_path).returncode == 0
    done = run_ldm2(*arguments, "-", cwd=tmp_path, text=False)
    assert done.stdout == (tmp_path / "x.wav").read_bytes() and b"level difference" in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys, ldm2.__main__\n"
        "for command in ('inpaint', 'reconstruct'):\n"
        "    try: ldm2.__main__.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'soundfile', 'soxr', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--no-paste" in done.stdout and "--plot" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
