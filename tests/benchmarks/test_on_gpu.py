"""The script for a machine with a GPU: what it plans, and how it gets through parts that fail or take too long."""

from __future__ import annotations

import os
import tarfile
import time

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import on_gpu
from benchmarks.on_gpu import Part

QUICK = Part("quick", 60, ["timeit", "-n1", "-r1", "print('| row | ldm2 | 1.00 |')"])
FAILING = Part("failing", 60, ["json.tool", "nowhere.json"])
# Starts a process that writes its number and waits.
CHILD = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
SLOW = Part("slow", 3, ["timeit", "-n1", "-r1", "-s", "import subprocess as s, sys",
                        f"print('| row | ldm2 | 2.00 |', flush=True); s.run([sys.executable, '-c', {CHILD!r}])"])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """on_gpu with some parts; returns its exit code and the overview that it wrote."""

    def run(*parts, minutes=1.0, options=()):
        monkeypatch.setattr(on_gpu, "parts", lambda device, size, out: list(parts))
        code = on_gpu.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", str(minutes), *options])
        return code, (tmp_path / "gpu.md").read_text()

    return run


def test_every_row_is_measured_by_commands_that_benchmarks_know(tmp_path):
    commands = [part.command[1:] for part in on_gpu.parts("cuda", "base", tmp_path) if part.command[0] == "benchmarks"]
    parsed = [benchmarks.options().parse_args(command) for command in commands]
    assert {name for args in parsed for name in args.rows.split(",")} == set(benchmarks.ROWS)
    assert len({args.name for args in parsed}) == len(parsed)


def test_tests_that_need_a_gpu_are_found_by_their_mark(tmp_path):
    command = next(part.command for part in on_gpu.parts("cuda", "base", tmp_path) if part.name == "cuda-tests")
    assert {"tests/runtime/test_graphs.py", "tests/runtime/test_compilation.py", "tests/test_unet.py"} <= set(command)
    assert "tests/test_config.py" not in command


def test_weights_are_written_where_they_are_missing_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [weights] = [part for part in on_gpu.parts("cuda", "base", tmp_path) if part.name == "weights"]
    assert weights.command[:2] == ["benchmarks.full_size", "build/random-base"]
    (tmp_path / "build" / "random-base").mkdir(parents=True)
    for size in ("base", "tiny"):
        assert "weights" not in [part.name for part in on_gpu.parts("cuda", size, tmp_path)]


def test_a_part_that_fails_or_is_slow_costs_the_others_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, overview = run(FAILING, SLOW, QUICK)
    assert code == 1
    for words in ("| failing | failed with exit code ", "nowhere.json", "| slow | stopped after 3 s |",
                  "| row | ldm2 | 2.00 |", "| quick | done |", "| row | ldm2 | 1.00 |"):
        assert words in overview
    pid = int((tmp_path / "pid").read_text())              # what a stopped part started is stopped too
    for _ in range(100):                                   # who adopted it may take a moment to bury it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_after_each_part_one_archive_has_all_results_so_far(run, tmp_path, monkeypatch):
    def packed(*arguments):
        pack(*arguments)
        with tarfile.open(path) as archive:
            found.append((sorted(archive.getnames()), archive.extractfile("gpu.md").read().decode()))

    found, pack, path = [], on_gpu.pack, tmp_path / "away" / "all.tar.gz"
    monkeypatch.setattr(on_gpu, "pack", packed)
    for name in ("gpu-failing.json", "other.md"):          # of an earlier run; of something else
        (tmp_path / name).write_text("{}")
    writing = Part("writing", 60, ["timeit", "-n1", "-r1", f"open({str(tmp_path / 'gpu-writing.json')!r}, 'w')"])
    run(writing, FAILING, options=["--pack", str(path)])
    assert [names for names, _ in found] == [
        ["gpu-writing.json", "gpu-writing.log", "gpu.md"],
        ["gpu-failing.log", "gpu-writing.json", "gpu-writing.log", "gpu.md"]]
    assert "failing" not in found[0][1] and "| failing | failed with exit code " in found[1][1]
    assert [file.name for file in path.parent.iterdir()] == ["all.tar.gz"]


def test_no_part_is_begun_when_time_is_up(run):
    code, overview = run(QUICK, minutes=0.1)
    assert code == 1 and "| quick | left out: no time left | 0 |" in overview


def test_without_diffusers_what_needs_it_is_left_out_and_that_is_said(run, monkeypatch):
    monkeypatch.setattr(on_gpu, "find_spec", lambda package: None)
    code, overview = run(Part("weights", 60, FAILING.command, "diffusers"), QUICK)
    assert code == 1
    for words in (on_gpu.ALONE,
                  "| weights | left out: diffusers is not installed | 0 |", "| quick | done |"):
        assert words in overview


def test_parts_can_be_chosen_and_unknown_ones_are_named(tmp_path, capsys, monkeypatch):
    ran, where = [], ["--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(on_gpu, "run", lambda part, left, log: ran.append(part.name) or (on_gpu.DONE, 0.0, []))
    assert on_gpu.main(["--parts", "unet-bfloat16,kernel-tests", *where]) == 0
    assert ran == ["unet-bfloat16", "kernel-tests"]
    with pytest.raises(SystemExit):
        on_gpu.main(["--parts", "unet-float16,magic", *where])
    assert "unknown parts magic, choose from kernel-tests" in capsys.readouterr().err


def test_where_there_is_no_gpu_nothing_is_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path / "results")])
    assert "finds no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_benchmark_of_the_tiny_model_runs_as_a_part(tmp_path):
    command = ["benchmarks", "--device", "cpu", "--size", "tiny", "--rows", "text", "--repeats", "1", "--threads", "1",
               "--no-diffusers", "--out", str(tmp_path), "--name", "x"]
    what, _, told = on_gpu.run(Part("text", 300, command), 300, tmp_path / "x.log")
    assert what == on_gpu.DONE
    assert any(line.startswith("| text | ldm2 | ") for line in told)
    assert {"x.log", "x.md", "x.json"} <= {path.name for path in tmp_path.iterdir()}
