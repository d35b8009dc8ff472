"""The benchmark suite: alternation, failures, tables, FLOP from sizes alone, and one small run of everything."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import ldm2_kernels
import pytest
import torch
from ldm2_kernels.cases import FULL, SMALL, TALL, cases

import ldm2
from benchmarks import __main__ as benchmarks
from benchmarks import on_gpu, parity, report, rows, timing
from benchmarks.bench import Bench
from benchmarks.flop import Flop
from benchmarks.kernels import kernels
from benchmarks.timing import Row, Timed
from ldm2 import ops
from ldm2.pipeline import NonFiniteError
from ldm2.runtime import profiling
from ldm2.runtime.profiling import Limits
from ldm2.settings import Settings

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def pipe():
    """The bundled model."""
    return ldm2.load("tiny", device="cpu", reference="diffusers")


def timed(variant: str, *seconds: float, flop: int = 0) -> Timed:
    return Timed("unet", "UNet step", variant, flop, list(seconds), [1_000_000] * len(seconds))


def test_variants_alternate_and_the_first_round_does_not_count():
    calls = []
    row = Row("x", "x", {name: lambda name=name: lambda: calls.append(name) for name in "ab"})
    found = timing.measure(row, CPU, repeats=2)
    assert calls == list("ababab")
    assert [(one.variant, len(one.seconds), len(one.memory)) for one in found] == [("a", 2, 2), ("b", 2, 2)]


def test_several_calls_make_one_measurement_and_the_seconds_are_those_of_one(monkeypatch):
    def seconds_of(run, device):
        run()
        return 0.5

    calls = []
    monkeypatch.setattr(profiling, "seconds_of", seconds_of)
    row = Row("x", "x", {"a": lambda: lambda: calls.append(1)}, calls=5)
    [found] = timing.measure(row, CPU, repeats=2, at_least=1.5)
    assert found.seconds == [0.1] * 3 and len(calls) == 4 * 5


@pytest.mark.parametrize("error", [RuntimeError, TypeError, NonFiniteError, ImportError])
@pytest.mark.parametrize("when", ["made", "run"])
def test_a_variant_that_fails_is_left_out_and_says_why(error, when, capsys):
    def fail():
        raise error("no kernel\nfor this")

    row = Row("x", "x", {"a": fail if when == "made" else lambda: fail, "b": lambda: lambda: None})
    found = timing.measure(row, CPU, repeats=2)
    assert found[0].error == f"{error.__name__}: no kernel for this" and not found[0].seconds
    assert found[1].error is None and len(found[1].seconds) == 2
    assert "in fail" in capsys.readouterr().err


def test_stopping_is_no_failure_of_a_variant():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure(Row("x", "x", {"a": lambda: stop}), CPU, repeats=2)


def test_the_speed_is_the_median_over_pairs_of_neighbours():
    assert timing.ratio(timed("ours", 1.0, 2.0, 10.0), timed("theirs", 2.0, 6.0, 10.0)) == 2.0


def test_rows_compare_with_the_last_variant_and_with_the_limit():
    first, last = report.rows([timed("ldm2", 1.0, 1.0, flop=50), timed("diffusers", 2.0, 3.0)], Limits(100.0, 1.0))
    assert (first["speed"], first["flop_rate"], first["share"], first["wide"]) == (2.5, 50.0, 0.5, False)
    assert (last["speed"], last["flop_rate"], last["share"], last["wide"]) == (None, None, None, True)


def test_the_table_tells_machine_versions_command_failures_and_wide_spreads():
    failed = timed("ldm2, torch.compile")
    failed.error = "no compiler"
    found = report.rows([failed, timed("ldm2", 0.5, 1.0)], Limits(2e9, 3e9))
    about = report.about("python -m benchmarks", CPU, {"dtype": "float16", "their_dtype": "float32", "size": "base"})
    table = report.markdown(about, Limits(2e9, 3e9), found, {"ldm2": 2.5e9}, ["a note"])
    for words in (f"torch {torch.__version__}", "`python -m benchmarks`", "float16 (diffusers: float32)",
                  "matrix product 2 GFLOP/s, copy 3.0 GB/s", "failed: no compiler", "| UNet step | ldm2 | 750.00* |",
                  "| ldm2 | 2.50 |", "a note"):
        assert words in table


def test_the_cpu_is_told_by_name_and_vector_units(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Some CPU 9000\nflags\t\t: fpu avx2 amx_bf16\n"
    monkeypatch.setattr(report.Path, "read_text", lambda path, **options: text)
    about = report.about("", CPU, {})
    assert (about["machine"], about["vector_units"]) == ("Some CPU 9000", "avx2 amx_bf16")


def test_flop_from_sizes_is_flop_of_a_run(pipe):
    flop = Flop(pipe)
    settings = Settings("a low tone", seconds=0.64, steps=2, seed=0).resolved()
    works = {work.name: work for work in profiling.works(pipe, settings)}
    assert flop.decode(0.64) == profiling.flop_of(works["VAE"].run)
    assert flop.vocode(0.64) == profiling.flop_of(works["vocoder"].run)
    step = profiling.flop_of(works["UNet step"].run)
    assert flop.step(0.64) == pytest.approx(step, rel=0.05)                  # the prompt has other than TOKENS tokens


def test_a_generation_is_its_stages(pipe):
    flop = Flop(pipe)
    assert flop.generation(0.64, 3, rows=2) == 3 * flop.step(0.64, 2) + flop.decode(0.64, 2) + flop.vocode(0.64, 2)


@pytest.mark.parametrize("name", cases(META, torch.float32))
@pytest.mark.parametrize("sizes", [FULL, SMALL, TALL])
def test_the_cases_of_kernels_are_arguments_of_the_operations(name, sizes):
    with ops.backend("reference"):
        assert getattr(ops, name)(*cases(META, torch.float32, sizes)[name]()) is not None


@pytest.mark.parametrize("device, calls", [("cpu", 1), ("cuda", 10)])
def test_there_is_a_row_for_each_kernel(device, calls, monkeypatch):
    monkeypatch.setattr("ldm2_kernels.cases.cases", lambda device, *rest: cases(META, *rest))
    bench = SimpleNamespace(device=SimpleNamespace(type=device), ours=SimpleNamespace(dtype=torch.float16))
    names = [row.name.split()[1].rstrip(",") for row in kernels(bench)]
    assert sorted(names) == sorted(name for name, module in ldm2_kernels.MODULES[device].items() if module is not None)
    assert {row.calls for row in kernels(bench)} == {calls}


def test_a_compiled_diffusers_is_what_ldm2_is_compared_with_and_not_there_without_it(pipe, oracle):
    bench = Bench(pipe, lambda: oracle, None, 0.16, 1, 1, torch.float32)
    [row] = rows.generation_compiled(bench)
    assert list(row.variants) == ["ldm2", "diffusers, torch.compile"]
    with torch.compiler.set_stance("force_eager"):
        found = timing.measure(row, CPU, repeats=1)
    assert [one.error for one in found] == [None, None]
    assert list(rows.generation_compiled(Bench(pipe, None, None, 0.16, 1, 1, torch.float32))) == []


def test_what_is_compiled_is_measured_where_it_is_asked_for_by_name():
    asked = benchmarks.options().parse_args([]).rows.split(",")
    assert set(benchmarks.ROWS) - set(asked) == {"diffusers-compiled", "generation-compiled", "ldm2-compiled"}


def test_the_plot_shows_length_and_batch(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        {"subject": subject, "name": name, "variant": variant, "seconds": 1.0}
        for subject, name in (("length", "5 s, 2 steps"), ("length", "10 s, 2 steps"), ("batch", "1 x 10 s, 2 steps"))
        for variant in ("ldm2", "diffusers")
    ]
    path = report.plot(tmp_path / "plot.png", lines)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_there_is_no_plot_without_length_and_batch(tmp_path):
    assert report.plot(tmp_path / "plot.png", [{"subject": "unet"}]) is None


@pytest.mark.parametrize("main, arguments, told", [
    (benchmarks.main, ("--seconds", "-1"), "--seconds: must be a number above 0, got '-1'"),
    (benchmarks.main, ("--seconds", "nan"), "--seconds: must be a number above 0, got 'nan'"),
    (benchmarks.main, ("--steps", "0"), "--steps: must be a positive integer, got '0'"),
    (benchmarks.main, ("--threads", "-3"), "--threads: must be a positive integer, got '-3'"),
    (benchmarks.main, ("--dtype", "nope"), "unknown dtype 'nope'"),
    (benchmarks.main, ("--device", "abacus"), "unknown device 'abacus'"),
    (benchmarks.main, ("--rows", "unet,magic"), "unknown rows magic, choose from unet, "),
    (parity.main, ("--dtypes", "float32,nope"), "unknown dtype 'nope'"),
    (parity.main, ("--steps", "1.5"), "--steps: must be a positive integer, got '1.5'"),
    (on_gpu.main, ("--minutes", "nan"), "--minutes: must be a number above 0, got 'nan'"),
])
def test_bad_values_are_refused_before_anything_is_loaded(main, arguments, told, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments])
    assert exit.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_a_run_in_which_all_fails_has_failed(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no")

    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    arguments = ["--rows", "unet", "--size", "tiny", "--no-diffusers", "--repeats", "1", "--out", str(tmp_path)]
    for make, code in ((fail, 1), (lambda: fail, 1), (lambda: lambda: None, 0)):
        monkeypatch.setitem(benchmarks.SUBJECTS, "unet", lambda bench, make=make: [Row("unet", "x", {"ldm2": make})])
        assert benchmarks.main(arguments) == code


def test_everything_runs_beside_diffusers(tmp_path, monkeypatch, capsys, tiny_checkpoint):
    monkeypatch.setattr(rows, "LENGTHS", (0.2, 10.5))
    monkeypatch.setattr(rows, "BATCHES", (2,))
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    asked = "unet,vae,vocoder,text,load,generation,length,batch"
    assert benchmarks.main([
        "--rows", asked, "--folder", str(tiny_checkpoint), "--seconds", "0.2", "--steps", "1", "--sweep-steps", "1",
        "--repeats", "1", "--out", str(tmp_path), "--name", "x",
    ]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "x.md")
    found = json.loads((tmp_path / "x.json").read_text())
    assert {row["subject"] for row in found["rows"]} == set(asked.split(","))
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert {row["variant"] for row in found["rows"]} == {"ldm2", "ldm2, windows of 10.24 s", "diffusers"}


def test_a_run_that_is_stopped_has_told_what_it_measured(tmp_path, monkeypatch, capsys):
    def two_rows(bench):
        yield Row("unet", "first", {"ldm2": lambda: lambda: None})
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmarks.SUBJECTS, "unet", two_rows)
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(["--rows", "unet", "--size", "tiny", "--out", str(tmp_path)])
    assert re.search(r"^\| first \| ldm2 \| \d+\.\d\d", capsys.readouterr().err, re.MULTILINE)


def test_a_process_of_its_own_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capfd):
    def run(command, **options):
        code = "raise SystemExit(3)" if "diffusers" in command else "print(2500000000)"
        return real([sys.executable, "-c", f"import sys; print('why', file=sys.stderr); {code}"], **options)

    real = subprocess.run
    monkeypatch.setattr(benchmarks, "PROCESSES", ("diffusers", "ldm2"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    assert benchmarks.main(["--rows", "memory", "--size", "tiny", "--out", str(tmp_path), "--name", "x"]) == 0
    told = capfd.readouterr()
    assert "| diffusers | failed with exit code 3 |\n| ldm2 | 2.50 |" in told.out and "why" in told.err
    assert json.loads((tmp_path / "x.json").read_text())["processes"] == {
        "diffusers": "failed with exit code 3", "ldm2": 2.5e9}


def test_a_subject_that_fails_between_its_rows_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    def failing(bench):
        yield Row("unet", "first", {"ldm2": lambda: lambda: None})
        raise TypeError("not this version")

    monkeypatch.setitem(benchmarks.SUBJECTS, "unet", failing)
    monkeypatch.setitem(benchmarks.SUBJECTS, "vae", lambda bench: [Row("vae", "next", {"ldm2": lambda: lambda: None})])
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    assert benchmarks.main(["--rows", "unet,vae", "--size", "tiny", "--out", str(tmp_path)]) == 0
    rest = "| unet | all that is left | failed: TypeError: not this version | | | | |"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| first", "| unet", "| next"))]
    assert lines[0].startswith("| first | ldm2 | ") and lines[1] == rest and lines[2].startswith("| next | ldm2 | ")


def test_diffusers_that_cannot_be_loaded_fails_by_itself(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ImportError("another version of transformers is needed")

    monkeypatch.setattr(benchmarks, "diffusers_pipeline", fail)
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    assert benchmarks.main(["--rows", "unet,text,load", "--size", "tiny", "--seconds", "0.2", "--repeats", "1",
                            "--out", str(tmp_path), "--name", "x"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["subject"], row["variant"], row.get("error")) for row in found] == [
        (subject, variant, None if variant == "ldm2" else "ImportError: another version of transformers is needed")
        for subject in ("unet", "text", "load") for variant in ("ldm2", "diffusers")]


def test_without_diffusers_ldm2_runs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(profiling, "limits", lambda device, dtype: Limits(1e9, 1e9))
    assert benchmarks.main(["--rows", "unet,load,memory", "--size", "tiny", "--seconds", "0.2", "--repeats", "1",
                            "--out", str(tmp_path), "--name", "x"]) == 0
    assert "diffusers is not installed" in capsys.readouterr().out
    assert [row["variant"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == ["ldm2"]


def test_a_full_size_folder_is_there_when_all_of_it_is(tmp_path, monkeypatch):
    full_size = pytest.importorskip("benchmarks.full_size")

    def save(folder, **parts):
        folder.mkdir()
        (folder / "part").write_text("")
        if fails:
            raise KeyboardInterrupt

    for name in ("unet", "vae", "vocoder", "clap", "t5", "gpt2", "projection"):
        monkeypatch.setattr(full_size, name, lambda *size: None)
    monkeypatch.setattr(full_size.checkpoints, "save", save)
    for fails in (True, False):
        with contextlib.suppress(KeyboardInterrupt):
            assert full_size.save(tmp_path / "base") == tmp_path / "base"
        assert (tmp_path / "base" / "part").exists() is not fails
    with pytest.raises(FileExistsError, match="base exists already"):
        full_size.save(tmp_path / "base")
