"""The command line: what is written, printed and refused; once as a process of its own."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from ldm2 import audio, samplers, schedules, settings
from ldm2.cli import output
from ldm2.cli.commands import main
from ldm2.option_kinds import parse_interval
from ldm2.pipeline import AudioLDM2
from ldm2.settings import PRESETS
from tests.helpers import PACKAGES, PROMPT, ROOT, run_ldm2


def _raise(error: Exception):
    raise error


def short(model):
    """Options for one step of a short sound."""
    return ("--model", model, "--steps", 1, "--seconds", 0.2)


@pytest.fixture
def generate(tiny_checkpoint, run):
    """Run `ldm2 generate` on the tiny checkpoint with one step, in an empty folder -> exit code, stdout, stderr."""
    return lambda *arguments: run("generate", PROMPT, *short(tiny_checkpoint), *arguments)


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Run `ldm2 ARGUMENTS` in this process, in an empty folder; check that it is refused in one line with `words`."""
    def run(arguments, words):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:                          # how argparse ends
            code = stop.code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert (code, out, len(lines)) == (2, "", 1), err
        for word in words:
            assert word in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
    return run


def test_generate_writes_the_file_and_prints_its_path_last(tiny_checkpoint, tmp_path):
    done = run_ldm2("generate", PROMPT, *short(tiny_checkpoint), "-o", "dog.flac", "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "dog.flac"
    assert "0.20 s" in done.stderr and "seed 3" in done.stderr
    sound, rate = soundfile.read(tmp_path / "dog.flac")
    assert (len(sound), rate) == (3200, 16000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dog.flac"]


def test_without_a_name_the_prompt_names_the_file_and_nothing_is_overwritten(generate, tmp_path):
    names = [generate("--seed", seed)[1].strip() for seed in (1, 2)]
    assert names == ["a-dog-barking-in-the-rain.wav", "a-dog-barking-in-the-rain-2.wav"]
    assert (tmp_path / names[0]).read_bytes() != (tmp_path / names[1]).read_bytes()
    assert generate("--seed", 2, "--overwrite")[1].strip() == names[0]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_the_file_tells_what_the_fast_options_were(tiny_checkpoint, tmp_path):
    target = tmp_path / "x.wav"
    short = ("--steps", "1", "--seconds", "0.2", "-o", str(target))
    fast = ("--preset", "fast", "--guidance-interval", ":0.7", "--reuse", "2", "--spacing", "linspace")
    assert main(["generate", PROMPT, "--model", str(tiny_checkpoint), *short, *fast]) == 0
    settings = json.loads(audio.read_metadata(target)["comment"])
    assert (settings["steps"], settings["sampler"]) == (1, PRESETS["fast"]["sampler"])
    assert (settings["guidance_interval"], settings["cache_interval"], settings["spacing"]) == ([0, 0.7], 2, "linspace")


@pytest.mark.parametrize("text, expected", [
    ("0.1:0.8", (0.1, 0.8)), (":0.8", (0, 0.8)), ("0.1:", (0.1, 1)), (":", (0, 1)), ("0:0", (0, 0)),
])
def test_an_interval_is_read_from_one_word(text, expected):
    assert parse_interval(text) == expected


def test_several_waveforms_become_several_files(generate, tmp_path):
    assert generate("-o", "x.wav", "--num-waveforms", 2)[1].split() == ["x-1.wav", "x-2.wav"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1.wav", "x-2.wav"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = run_ldm2("generate", PROMPT, "--sampler", "magic", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "magic" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(generate, refuse, tmp_path):
    (tmp_path / "x.wav").write_text("precious")
    refuse(("generate", PROMPT, "-o", "x.wav"), ("x.wav", "--overwrite"))
    assert (tmp_path / "x.wav").read_text() == "precious"
    assert generate("-o", "x.wav", "--overwrite")[0] == 0
    assert soundfile.info(tmp_path / "x.wav").frames == 3200


@pytest.mark.parametrize("arguments, words", [
    (("-o", "x.txt"), (".txt", ".wav")),
    (("-o", "none/x.wav"), ("none",)),
    (("--steps", 0), ("steps", "0")),
    (("--steps", "many"), ("many",)),
    (("--seconds", "nan"), ("seconds", "nan")),
    (("--seconds", -2), ("seconds", "-2")),
    (("--seconds", "1e9"), ("seconds",)),
    (("--seconds", "600.0001"), ("at most 600 seconds, got 600.0001",)),
    (("--subtype", "PCM_24", "-o", "x.ogg"), (".ogg", "pcm24")),
    (("--sample-rate", 44_100, "-o", "x.opus"), (".opus", "44100")),
    (("--sample-rate", 2**31, "-o", "-"), ("2147483647 Hz", "2147483648")),
    (("--sampler", "magic"), ("magic", "ddim", "unipc")),
    (("--eta", 0.5, "--sampler", "euler"), ("eta", "ddim")),
    (("--preset", "quick"), ("quick", "fast")),
    (("--guidance-interval", "0.5"), ("FROM:TO", "0.5")),
    (("--guidance-interval", "a:b"), ("FROM:TO", "a:b")),
    (("--guidance-interval", "0.5:0.2"), ("guidance_interval", "0.5", "0.2")),
    (("--guidance-interval", "0:2"), ("guidance_interval", "2")),
    (("--guidance-interval", "-0.1:1"), ("--guidance-interval", "goes after =")),
    (("--guidance-interval=-0.1:1",), ("guidance_interval", "got -0.1 to 1")),
    (("--reuse", 0), ("cache_interval", "0")),
    (("--spacing", "karras"), ("karras", "leading", "trailing", "linspace")),
    (("--reuse", "often"), ("--reuse", "often")),
    (("--dtype", "int4"), ("int4", "float16")),
    (("--device", "gpu"), ("gpu", "cuda")),
    (("--device", "cuda:42"), ("cuda:42",)),
    (("--reference", "nobody"), ("nobody", "authors", "diffusers")),
    (("--num-waveforms", 0), ("num_waveforms", "0")),
    (("--seed", 2**64), ("seed", str(2**64))),
    (("--model", "no/such/folder/"), ("no/such/folder",)),
    (("--model", "."), ("model_index.json",)),
    (("--model", "https://example.org/a/b"), ("https://example.org/a/b is an address", "OWNER/MODEL")),
    (("--model", "audioldm3"), ("audioldm3", "audioldm2")),
    (("--model", "audioldm2", "--local-files-only"), ("ldm2 download",)),
    (("--nonsense",), ("--nonsense",)),
])
def test_bad_options_are_refused_in_one_line(refuse, arguments, words):
    refuse(("generate", PROMPT, *arguments), words)


@pytest.mark.parametrize("arguments, words", [
    (("generate", "x", "--subtype", "FLOAT", "-o", "x.flac"), (".flac", "float32")),
    (("generate", "x", "--sample-rate", 44_100, "-o", "x.opus"), (".opus", "44100")),
    (("batch", "x.csv", "-o", "x", "--format", "mp3", "--sample-rate", 96_000), (".mp3", "96000")),
    (("batch", "x.csv", "-o", "x", "--subtype", "PCM_32"), (".flac", "pcm32")),
])
def test_a_rate_or_subtype_that_a_format_lacks_is_refused_before_the_work(refuse, monkeypatch, arguments, words):
    monkeypatch.setattr(ldm2, "load", None)
    refuse(arguments, words)


@pytest.mark.parametrize("arguments, prompts", [
    (("generate", "-loud"), True), (("transfer", "x.wav", "-loud"), True), (("eval", "x", "--model", "tiny"), False),
    (("models", "--json"), False), (("info", "tiny", "more"), False),
])
def test_who_takes_no_prompt_is_not_told_how_to_give_one(capsys, arguments, prompts):
    with pytest.raises(SystemExit):
        main(list(arguments))
    told = capsys.readouterr().err
    assert "unrecognized arguments" in told and ("a prompt that begins with -" in told) == prompts


def test_a_prompt_with_a_zero_character_is_refused(refuse, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a dog\0barking"))
    refuse(("generate", "-", "--model", "tiny"), ("prompt contains a zero character at index 5",))


def test_a_prompt_on_stdin_is_text_without_a_byte_order_mark(tiny_checkpoint, run, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa low bell\r\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    assert run("generate", "-", *short(tiny_checkpoint), "-q", "-o", "x.wav")[0] == 0
    assert json.loads(audio.read_metadata(tmp_path / "x.wav")["comment"])["prompt"] == "a low bell"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, _, err = run("generate", "-", *short(tiny_checkpoint))
    assert code == 2 and err.startswith("ldm2: error: the prompt on stdin is not text: 'utf-8' codec can't decode")


def test_the_sound_on_stdout_is_the_file(tiny_checkpoint, tmp_path):
    arguments = ("generate", PROMPT, *short(tiny_checkpoint), "--seed", 1, "-q", "-o")
    assert run_ldm2(*arguments, "x.wav", cwd=tmp_path).returncode == 0
    assert run_ldm2(*arguments, "-", cwd=tmp_path, text=False).stdout == (tmp_path / "x.wav").read_bytes()


def test_an_empty_prompt_is_refused(refuse):
    refuse(("generate", " "), ("empty",))


def test_a_folder_is_made_where_one_is_named(run, tmp_path):
    fast = ("--model", "tiny", "--steps", 1, "--seconds", 0.2, "-q")
    assert run("generate", "rain", *fast, "-o", "new/")[0] == 0
    assert run("reconstruct", "new/rain.wav", "--model", "tiny", "-q", "-o", "other/")[0] == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.wav"))
    assert found == ["new/rain.wav", "other/rain-reconstruct.wav"]


@pytest.mark.parametrize("place, words", [
    ("gone/new/", ("folder gone ", "does not exist")), ("gone/x.wav", ("folder gone ", "does not exist")),
    ("a.txt/", ("a.txt", "exists")),
])
def test_a_folder_is_made_in_one_that_exists(refuse, tmp_path, place, words):
    (tmp_path / "a.txt").write_text("")
    refuse(("generate", PROMPT, "-o", place), words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(refuse, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(("generate", PROMPT, "-o", "locked/x.wav"), ("locked",))


def test_ctrl_c_ends_with_130_and_leaves_no_file(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from ldm2.unet import UNet

    calls = []
    forward = UNet.forward

    def interrupted(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(UNet, "forward", interrupted)
    monkeypatch.chdir(tmp_path)
    short = ("--steps", "50", "--seconds", "0.2", "-o", "x.wav")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)        # a job in the background ignores it
    try:
        code = main(["generate", PROMPT, "--model", str(tiny_checkpoint), *short])
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "stopped" in capsys.readouterr().err
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals of this kind")
def test_sigterm_ends_with_143_and_leaves_no_file(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audio.writing, "_encode", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)                   # Ray leaves a handler of its own
    try:
        code = main(["generate", PROMPT, "--model", str(tiny_checkpoint), "--steps", "1", "--seconds", "0.2",
                     "-o", str(tmp_path / "x.wav"), "--num-waveforms", "3"])
    finally:
        after = signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    assert code == 143 and "stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and after == signal.SIG_DFL


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(1 << 60),
    lambda: np.empty(1 << 50),
    functools.partial(_raise, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nGPU 0 has a")),
    functools.partial(_raise, RuntimeError("CUDA error: out of memory")),
    functools.partial(_raise, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    functools.partial(_raise, RuntimeError("std::bad_alloc")),
])
def test_no_memory_is_one_line_and_exit_code_1(tiny_checkpoint, tmp_path, monkeypatch, capsys, fail):
    monkeypatch.setattr(AudioLDM2, "decode", lambda *_, **__: fail())
    arguments = ["generate", PROMPT, "--model", str(tiny_checkpoint), "--steps", "1", "--seconds", "0.2"]
    assert main([*arguments, "-o", str(tmp_path / "a.wav"), "-q"]) == 1
    assert capsys.readouterr().err.startswith("ldm2: error: out of memory: --low-memory, ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, told", [
    (["profile", "--random", "tiny"], ": --dtype bfloat16, a smaller --batch, shorter --seconds may help"),
    (["models"], ""),
])
def test_without_memory_each_command_names_options_of_its_own(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr("ldm2.checkpoints.random_models.pipeline", lambda *_, **__: _raise(MemoryError()))
    monkeypatch.setattr("ldm2.cli.checkpoints.table", lambda: _raise(MemoryError()))
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"ldm2: error: out of memory{told}\n"


def test_other_errors_of_pytorch_are_not_taken_for_it(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(AudioLDM2, "decode", lambda *_, **__: _raise(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["generate", PROMPT, "--model", str(tiny_checkpoint), "--steps", "1", "--seconds", "0.2", "-q"])


@pytest.mark.parametrize("closed, arguments, code", [
    ("<&-", "generate - --model tiny", 2), ("<&-", "batch - -o out --model tiny", 2),
    (">&-", "generate x --model tiny --steps 1 --seconds 0.2 -q -o x.wav", 0),
])
def test_closed_streams_hold_and_take_nothing(tmp_path, closed, arguments, code):
    command = f"{sys.executable} -m ldm2 {arguments} {closed}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": PACKAGES},
                          capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") == (code != 0), done.stderr
    assert (tmp_path / "x.wav").exists() == (code == 0)


def test_waiting_threads_sleep_unless_told_otherwise(tmp_path):
    """Those of OpenMP, which PyTorch starts: spinning ones starve a busy machine."""
    program = "import os, sys, ldm2.__main__ as cli; cli.main(['models']); print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "passive"), ("active", "active")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {"PYTHONPATH": PACKAGES} | ({} if given is None else {"OMP_WAIT_POLICY": given})
        done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, ldm2, ldm2.__main__\n"
        "try: ldm2.__main__.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'soundfile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--guidance-scale" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_samplers_and_spacings_of_a_request_are_those_that_exist():
    assert set(settings.SAMPLERS) == set(samplers.SAMPLERS)
    assert settings.SPACINGS == schedules.SPACINGS


def test_info_tells_parts_parameters_and_heads(tiny_checkpoint, run):
    code, out, _ = run("info", tiny_checkpoint)
    assert code == 0 and all(word in out for word in ("unet", "vae", "vocoder", "float32", "heads"))


def test_models_lists_the_published_checkpoints(run):
    code, out, _ = run("models")
    assert code == 0
    assert all(name in out for name in ("audioldm2", "audioldm2-large", "audioldm2-music", "cvssp/audioldm2", "tiny"))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_cpu_with_bfloat16_is_told_of_it(
    tiny_checkpoint, tmp_path, monkeypatch, capsys, bfloat16_instructions, dtype
):
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "1", "--seconds", "0.1", "--device", "cpu", "--dtype", dtype]
    assert main(["generate", PROMPT, "--model", str(tiny_checkpoint), *short]) == 0
    assert (output.BFLOAT16 in capsys.readouterr().err) == (dtype == "auto" and bfloat16_instructions)


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to build elsewhere")
@pytest.mark.parametrize("how, told", [({}, True), ({"LDM2_KERNELS": "auto", "CXX": "false"}, False)])
def test_that_the_kernels_are_not_built_is_told_once_and_not_to_who_wants_quiet(
    tiny_checkpoint, tmp_path, monkeypatch, capsys, how, told
):
    from ldm2_kernels import cpu

    monkeypatch.setattr(cpu, "folders", list)
    monkeypatch.delenv("LDM2_KERNELS", raising=False)
    for name, value in how.items():
        monkeypatch.setenv(name, value)
    command = ["generate", PROMPT, "--model", str(tiny_checkpoint), "--steps", "1", "--seconds", "0.2"]
    assert main([*command, "-o", str(tmp_path / "a.wav")]) == 0
    assert capsys.readouterr().err.count("python -m ldm2.build_kernels") == told
    assert main([*command, "-o", str(tmp_path / "b.wav"), "-q"]) == 0
    assert capsys.readouterr().err == ""
