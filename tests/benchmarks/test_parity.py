"""The script that measures how far fast paths are from plain ones, on the bundled model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import parity

ARGUMENTS = ["--size", "tiny", "--seconds", "0.64", "--steps", "3"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("parity")
    assert parity.main([*ARGUMENTS, "--dtypes", "float32,bfloat16", "--out", str(out)]) == 0
    table = (out / "parity.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[-6:]]
    return {(dtype, way): (float(exact), float(plain or 0)) for dtype, way, exact, plain in cells}


def test_float32_is_within_the_bar(rows):
    for way in ("ldm2", "ldm2, plain PyTorch", "diffusers"):
        exact, plain = rows["float32", way]
        assert exact < 2e-4
        assert plain < 2e-4


def test_bfloat16_is_no_further_from_float64_than_twice_diffusers(rows):
    theirs, _ = rows["bfloat16", "diffusers"]
    assert 1e-4 < theirs < 0.5
    for way in ("ldm2", "ldm2, plain PyTorch"):
        assert rows["bfloat16", way][0] <= 2 * theirs


def test_a_distance_is_relative_to_the_second_argument():
    assert parity.distance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
