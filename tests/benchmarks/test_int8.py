"""The benchmark of int8 weights, on the sizes of tiny."""

import json

import numpy as np
import pytest

from benchmarks import int8, tiny_quality


@pytest.mark.slow
def test_latents_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SECONDS", 0.5)
    monkeypatch.setattr(tiny_quality, "PROMPTS", dict(list(tiny_quality.PROMPTS.items())[:1]))
    assert int8.main(["--size", "tiny", "--rows", "latents", "--steps", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "int8.json").read_text())["rows"]
    assert all(row["what"].startswith("latents, tiny, ") for row in rows)
    assert [row["what"].split(", ")[-1] for row in rows] == ["int8", "w8a8"] * 2
    assert all(0 < row["value"] < 0.1 for row in rows)
    assert "kernels" in (tmp_path / "int8.md").read_text()


def test_steps_are_timed_and_sounds_judged_beside_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SECONDS", 0.5)
    monkeypatch.setattr(tiny_quality, "PROMPTS", dict(list(tiny_quality.PROMPTS.items())[:1]))
    monkeypatch.setattr(tiny_quality, "generate", lambda pipe, prompt, seed: np.zeros(16_000))
    arguments = ["--size", "tiny", "--rows", "speed,judge", "--repeats", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert int8.main(arguments) == 0
    rows = json.loads((tmp_path / "int8.json").read_text())["rows"]
    assert [row["what"].split(", ")[2] for row in rows] == ["bfloat16", "int8", "w8a8", "float32",
                                                            "float32", "int8", "w8a8"]
    assert all(row["value"] > 0 for row in rows[:4]) and rows[3]["speedup"] == 1
    assert [row.get("more") for row in rows[4:]] == [None, 0, 0]


def test_a_checkpoint_of_bytes_is_written_and_makes_a_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SECONDS", 0.5)
    folder = int8.write(tmp_path / "random", "tiny")
    assert 1e8 < int8.alone(folder, low_memory=True, steps=1) < 1e11
