"""Whole jobs with the model tiny: what lies in the folder, resuming, shards, workers that die, folders of others."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from ldm2 import audio
from ldm2.batch import local, manifest, pool, worker
from ldm2.batch.local import Folder
from ldm2.batch.rows import Rules, seed_of
from ldm2.batch.worker import Worker
from ldm2.cli.batch import _shard_around
from ldm2.cli.commands import main
from tests.helpers import PACKAGES, relative, tone

PROMPTS = ["a rising sweep", "low hum", "a high tone", "white noise", "low hum"]
SHORT = {"steps": 2, "seconds": 0.4}


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Run `ldm2 batch rows.jsonl -o FOLDER --model tiny ARGUMENTS` here -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(folder, *arguments, rows=None):
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["batch", "rows.jsonl", "-o", folder, "--model", "tiny", "-q", *arguments])
        return code, *capsys.readouterr()

    return call


def merged(folder) -> dict:
    """The merged manifest by the ids."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def sounds(folder) -> dict:
    """The bytes of each file below audio/."""
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "audio").rglob("*") if path.is_file()}


def some(count=5):
    return [{"prompt": PROMPTS[i % 5], "id": f"r{i}", **SHORT} for i in range(count)]


def test_each_row_has_the_sound_that_generate_makes_of_it(batch, tmp_path):
    rows = [*some(), {"prompt": "low hum", "negative_prompt": "wind", "seed": 3, **SHORT},
            {"prompt": "low hum", "num_waveforms": 2, "id": "best", **SHORT},
            {"prompt": "low hum", "loop": True, **SHORT}]
    assert batch("one", "--batch", "1", rows=rows)[0] == 0
    assert batch("many", "--batch", "4")[0] == 0
    one, many = merged(tmp_path / "one"), merged(tmp_path / "many")
    assert list(one) == list(many) and len(one) == 8 and not any(entry["error"] for entry in one.values())
    pipe = ldm2.load("tiny")
    for row, entry in zip(rows, one.values()):
        options = {"seed": seed_of(entry["id"]), **{name: value for name, value in row.items() if name != "id"}}
        result = pipe.generate(**options)[0]
        result.save(tmp_path / "alone.flac", overwrite=True)
        assert (tmp_path / "one" / entry["path"]).read_bytes() == (tmp_path / "alone.flac").read_bytes()
        near = soundfile.read(tmp_path / "many" / many[entry["id"]]["path"])[0]
        exact = result.channels[0, 0]
        assert np.abs(near - exact).max() <= 1e-4 * np.abs(exact).max() + 2**-15            # and its 16 bits
        assert (entry["seconds"], entry["sample_rate"]) == (len(near) / 16_000, 16_000)
    assert one["best"]["score"] is not None and one["r0"]["prompt"] == "a rising sweep"


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_rows_in_company_are_the_same_up_to_rounding(tmp_path, reference):
    made = Worker("tiny", str(tmp_path), load={"reference": reference})
    rules = Rules({})
    rows = [rules.row(i, {"prompt": prompt, **SHORT}) for i, prompt in enumerate(["hum", "a very long " * 9, "wind b"])]
    for together, row in zip(made.results(rows), rows):
        assert relative(together.waveforms, made.results([row])[0].waveforms) < 1e-4


def test_shards_together_are_one_run(batch, tmp_path):
    batch("one", "--batch", "1", rows=some(7))
    for number in (3, 1, 2):
        assert batch("parts", "--batch", "1", "--shard", f"{number}/3")[0] == 0
    assert sounds(tmp_path / "one") == sounds(tmp_path / "parts") and list(merged(tmp_path / "parts")) == [
        f"r{i}" for i in range(7)]


def test_a_second_run_does_what_is_missing(batch, tmp_path, monkeypatch):
    batch("out", "--batch", "1", rows=some(4))
    before = sounds(tmp_path / "out")
    lost, cut = sorted(before)[:2]
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / cut).write_bytes(before[cut][:100])
    with open(tmp_path / "out/manifest-1of1-0.jsonl", "ab") as file:
        file.write(b'{"id": "r1", "status": "o')            # a killed process's last words
    code, out, _ = batch("out", "--batch", "1")
    assert code == 0 and "4 rows: 2 were done before, 2 done now, 0 failed" in out
    assert sounds(tmp_path / "out") == before
    assert len((tmp_path / "out/manifest-1of1-0.jsonl").read_text().splitlines()) == 6
    monkeypatch.setattr(worker, "Worker", None)             # nothing is loaded when nothing is left
    assert batch("out", "--batch", "1")[0] == 0


def test_a_row_that_asks_for_something_else_is_made_again(batch, tmp_path):
    batch("out", rows=[{"prompt": "low hum", "id": "a", **SHORT}])
    first = sounds(tmp_path / "out")
    batch("out", rows=[{"prompt": "low hum", "id": "a", **SHORT, "steps": 3}])
    again = sounds(tmp_path / "out")
    assert list(first) == list(again) and first != again and len(merged(tmp_path / "out")) == 1


def test_hostile_rows_are_data_and_the_others_are_done(batch, tmp_path):
    bad = [{"prompt": ""}, {"prompt": "x", "seconds": float("nan")}, {"prompt": "x" * 10**6},
           {"prompt": "x", "id": "../x"},
           {"prompt": "x", "id": "i" * 1000}, {"prompt": "x", "steps": "many"}, {"prompt": "x", "id": "r0", "steps": 3},
           {"prompt": "x", "task": "transfer", "input": "gone.wav"}, {"prompt": "x", "transcription": "hello", **SHORT},
           {"prompt": "x", "prompt_at": [[9, "y"]], **SHORT}, {"prompt": "x", "seconds": 1e-9, "steps": 1}]
    code, out, err = batch("out", rows=[*some(3), *bad])
    found = merged(tmp_path / "out")
    assert code == 1 and "14 rows: 0 were done before, 3 done now, 11 failed" in out and "Traceback" not in err
    assert sorted(entry["line"] for entry in found.values() if entry["status"] == "error") == list(range(4, 15))
    assert all(entry["error"].startswith(f"line {entry['line']}: ") for entry in found.values() if entry["error"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]
    assert len(sounds(tmp_path / "out")) == 3
    assert "0 done now, 11 failed" in batch("out")[1]
    lines = len((tmp_path / "out/manifest-1of1-0.jsonl").read_text().splitlines())
    assert batch("out", "--retry-failed")[0] == 1
    assert len((tmp_path / "out/manifest-1of1-0.jsonl").read_text().splitlines()) == lines + 11


def test_equal_rows_share_a_file_and_columns_are_carried_through(batch, tmp_path):
    batch("out", rows=[{"prompt": "low hum", "label": "a", **SHORT}] * 2)
    [entry] = merged(tmp_path / "out").values()
    assert entry["label"] == "a" and len(sounds(tmp_path / "out")) == 1


def test_what_is_carried_through_is_text_and_json_in_both_manifests(batch, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    carried = [{"label": "caf\udce9"}, {"label": "ok", "odd": [float("nan"), 1e999]}]
    code, _, err = batch("out", rows=[row | each for row, each in zip(some(2), carried)])
    assert code == 0, err
    (tmp_path / "out/manifest.jsonl").read_text().index('"odd": [null, null]')
    table = parquet.read_table(tmp_path / "out/manifest.parquet").to_pydict()
    assert table["label"] == ['"caf\\udce9"', '"ok"'] and table["odd"] == [None, [None, None]]


def test_the_table_of_a_stream_is_called_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert main(["batch", "-", "-o", "out", "--model", "tiny"]) == 2
    assert capsys.readouterr().err == "ldm2: error: stdin holds no rows\n"


def test_edits_are_rows_too(batch, tmp_path):
    audio.write(tmp_path / "in.wav", tone(0.4), 16_000)
    rows = [{"task": "transfer", "input": "in.wav", "prompt": "low hum", "steps": 2, "id": "t"},
            {"task": "inpaint", "input": "in.wav", "times": [[0.1, 0.2]], "steps": 2, "id": "i"}]
    assert batch("out", rows=rows)[0] == 0
    pipe = ldm2.load("tiny")
    pipe.transfer("in.wav", "low hum", steps=2, seed=seed_of("t")).save(tmp_path / "t.flac")
    assert (tmp_path / "out" / merged(tmp_path / "out")["t"]["path"]).read_bytes() == (tmp_path / "t.flac").read_bytes()


def test_a_folder_of_another_job_is_refused(batch, tmp_path):
    batch("out", rows=some(1))
    code, _, err = batch("out", "--format", "wav")
    assert code == 2 and "format was 'flac', is 'wav'" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    code, _, err = batch("mine")
    assert code == 2 and "holds other files, such as notes.txt" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(local.fcntl is None, reason="no file locks here")
def test_a_folder_in_use_is_refused_until_its_owner_ends(batch, tmp_path):
    batch("out", rows=some(1))
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
            "time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out/.lock-1of1")], stdout=subprocess.PIPE)
    owner.stdout.readline()
    refused = batch("out")
    owner.kill()
    owner.wait()
    assert refused[0] == 2 and "another ldm2 batch works on this folder and shard" in refused[2]
    assert batch("out")[0] == 0


def test_out_of_memory_halves_and_goes_on(tmp_path):
    made, sizes = Worker("tiny", str(tmp_path), batch=8), []
    results = made.results

    def little(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return results(rows)

    made.results = little
    rules = Rules({})
    rows = [rules.row(i, {"prompt": "hum", "id": f"{i}", **SHORT}) for i in range(7)]
    assert [record["status"] for record in made.run(rows)] == ["ok"] * 7
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_row_that_fails_among_others_fails_alone(tmp_path):
    made = Worker("tiny", str(tmp_path))
    results = made.results

    def fails(rows):
        if any(row.id == "3" for row in rows):
            raise RuntimeError("a kernel\nis broken")
        return results(rows)

    made.results = fails
    rules = Rules({})
    records = made.run([rules.row(i, {"prompt": "hum", "id": f"{i}", **SHORT}) for i in range(5)])
    assert [record["status"] for record in records] == ["ok", "ok", "ok", "error", "ok"]
    assert records[3]["error"] == "line 3: RuntimeError: a kernel is broken"


def test_the_worker_takes_and_returns_columns(tmp_path):
    made = Worker("tiny", str(tmp_path), defaults=SHORT)
    columns = made({"prompt": np.array(["hum", ""], object), "id": np.array([1, 2]), "steps": np.array([1.0, np.nan])})
    assert columns["status"] == ["error", "error"] and "steps must be a positive integer" in columns["error"][0]
    columns = made({"prompt": ["hum"], "seed": np.array([4])})
    assert columns["status"] == ["ok"] and columns["seed"] == [4] and (tmp_path / columns["path"][0]).exists()


def test_text_is_encoded_once_a_distinct_prompt(tmp_path):
    made, seen = Worker("tiny", str(tmp_path)), []
    encode = made.pipe.encode
    made.pipe.encode = lambda prompts, **rest: seen.extend(prompts) or encode(prompts, **rest)
    rules = Rules({})
    made.run([rules.row(i, {"prompt": PROMPTS[i % 2], "id": f"{i}", **SHORT}) for i in range(6)])
    assert sorted(seen) == sorted(PROMPTS[:2])


def test_a_dry_run_tells_and_writes_nothing(batch, tmp_path):
    code, out, _ = batch("out", "--dry-run", rows=[*some(3), {"prompt": ""}])
    assert code == 1 and "4 rows: 0 done, 0 failed before, 4 to do, 1 with errors" in out
    assert "line 4: prompt must" in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [
    ("", "holds no rows"), ('{"prompt": "x", "step": 2}\n', "did you mean steps"),
])
def test_a_table_that_does_not_do_is_refused(batch, tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_text(content)
    code, _, err = batch("out")
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_full_disk_ends_the_job_in_one_line_and_a_rerun_completes(batch, tmp_path, monkeypatch):
    write, left = audio.writing._encode, [2]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("x.flac: writing failed (System error): is the disk full?")
        return write(*arguments)

    monkeypatch.setattr(audio.writing, "_encode", full)
    code, _, err = batch("out", rows=some(5))
    assert code == 1 and err.count("\n") == 1 and "is the disk full?" in err and len(sounds(tmp_path / "out")) == 2
    left[0] = 99
    assert "2 were done before, 3 done now, 0 failed" in batch("out")[1]


def test_the_shard_comes_from_the_cluster(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert _shard_around() == (1, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _shard_around() == (3, 4)
    for name, value in {"ID": "14", "MIN": "10", "STEP": "2", "COUNT": "5"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert _shard_around() == (3, 5)


@pytest.mark.parametrize("told, words", [
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, "SLURM_ARRAY_TASK_ID 7"),
    ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3",
      "SLURM_ARRAY_TASK_STEP": "2"}, "SLURM_ARRAY_TASK_ID 4"),
    ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK 4 is none of 4 tasks"), ({"WORLD_SIZE": "4"}, "RANK None"),
])
def test_a_part_that_cannot_be_is_refused(monkeypatch, told, words):
    for name in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{words}.*--shard"):
        _shard_around()


def _start(tmp_path, *arguments):
    command = [sys.executable, "-m", "ldm2", "batch", "rows.jsonl", "-o", "out", "--model", "tiny", "--batch", "1"]
    return subprocess.Popen([*command, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": PACKAGES},
                            stderr=subprocess.PIPE, text=True, preexec_fn=_hears_ctrl_c)


def _hears_ctrl_c():
    """What is started in the background of a shell does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait_for(condition, process):
    until = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("word, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_is_taken_up_again(batch, tmp_path, word, code):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"steps": 20}) + "\n" for row in some(200)))
    process = _start(tmp_path)
    _wait_for(lambda: (tmp_path / "out/audio").exists(), process)
    process.send_signal(word)
    assert process.communicate(timeout=30)[1].count("run the same command again to go on") == 1
    assert process.returncode == code
    done = manifest.settled(Folder(tmp_path / "out"))
    assert 0 < len(done) < 200 and len(sounds(tmp_path / "out")) == len(done)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_a_killed_worker_is_replaced_and_nothing_is_lost(batch, tmp_path):
    batch("one", "--batch", "1", rows=some(24))
    process = _start(tmp_path, "--workers", "2")
    _wait_for(lambda: (tmp_path / "out/audio").exists(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode == 0
    exact, found = ({path: soundfile.read(tmp_path / folder / path)[0] for path in sounds(tmp_path / folder)}
                    for folder in ("one", "out"))
    assert exact.keys() == found.keys() and len(merged(tmp_path / "out")) == 24
    assert all(np.array_equal(exact[path], found[path]) for path in exact)


def test_options_for_all_rows(batch, tmp_path):
    rows = [{"prompt": "low hum", "id": "a"}, {"prompt": "low hum", "id": "b", "steps": 3}]
    arguments = ("--set", "steps=2", "--set", "seconds=0.4", "--set", "negative-prompt=wind", "--set", "seed=3")
    assert batch("out", *arguments, rows=rows)[0] == 0
    told = {name: json.loads(audio.read_metadata(tmp_path / "out" / entry["path"])["comment"])
            for name, entry in merged(tmp_path / "out").items()}
    assert [told[name]["steps"] for name in "ab"] == [2, 3]
    assert {(each["negative_prompt"], each["seed"], each["seconds"]) for each in told.values()} == {("wind", 3, 0.4)}


def test_rows_that_are_alike_come_together():
    rules = Rules({})
    rows = [rules.row(i, {"prompt": f"p{i}", "seconds": 1.0 + i % 2}) for i in range(200)]
    for portion in pool.chunks(rows, 2):
        assert len(portion) <= pool.AT_ONCE
    lengths = [row.options["seconds"] for portion in pool.chunks(rows, 2) for row in portion]
    assert lengths == sorted(lengths)


def test_a_worker_that_is_killed_while_it_starts_is_started_again(monkeypatch):
    started = []

    class Process:
        def __init__(self, **_):
            started.append(self)

        def start(self):
            if len(started) < 2:
                raise BrokenPipeError(32, "Broken pipe")

    context = type("Context", (), {"Pipe": staticmethod(multiprocessing.Pipe), "Process": Process})
    member = pool._Member(context, {})
    assert len(started) == 2 and member.process is started[1]
