"""The benchmark of int8 weights, on the sizes of tiny."""

import json

import pytest

from benchmarks import int8, tiny_quality


@pytest.mark.slow
def test_latents_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SECONDS", 0.5)
    monkeypatch.setattr(tiny_quality, "PROMPTS", dict(list(tiny_quality.PROMPTS.items())[:1]))
    assert int8.main(["--size", "tiny", "--rows", "latents", "--steps", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "int8.json").read_text())["rows"]
    assert [row["what"].split(",")[0] for row in rows] == ["latents", "latents"]
    assert all(0 < row["value"] < 0.1 for row in rows)
    assert "kernels" in (tmp_path / "int8.md").read_text()


def test_a_checkpoint_of_bytes_is_written_and_makes_a_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SECONDS", 0.5)
    folder = int8.write(tmp_path / "random", "tiny")
    assert 1e8 < int8.alone(folder, low_memory=True, steps=1) < 1e11
