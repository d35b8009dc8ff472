"""The fuzzers with hypothesis, in small: `python -m tests.fuzz` is the long run."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.damage import Seeded
from tests.fuzz.inputs import Arguments, Sounds
from tests.fuzz.judge import targets


class Drawn:
    """Choices by hypothesis, which makes failing cases smaller."""

    def __init__(self, data: st.DataObject):
        self.data = data

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choose(self, values):
        return values[self.integer(0, len(values) - 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoints to damage, and a place for the copies."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "case").mkdir()
    return targets(place), place / "case"


@pytest.mark.parametrize("kind", ["hub folder", "authors' file"])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_checkpoint_gives_its_sound_or_is_refused_in_one_line(made, kind, data):
    found, place = made
    verdict = found[kind].case(place, Drawn(data))
    assert verdict.outcome == "right", verdict


@pytest.mark.parametrize("target", [Sounds(), Arguments()], ids=["sounds", "arguments"])
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_input_is_refused_in_one_line(tmp_path, target, data):
    verdict = target.case(tmp_path, Drawn(data))
    assert verdict.outcome == "right", verdict


# Cases that fell short once.
@pytest.mark.parametrize("kind, seed", [
    ("hub folder", 2000113), ("hub folder", 2000140), ("hub folder", 2000214), ("hub folder", 2000232),
    ("hub folder", 2000239), ("hub folder", 2000354), ("authors' file", 2000265),
])
def test_what_fell_short_once_is_right(made, kind, seed):
    found, place = made
    verdict = found[kind].case(place, Seeded(seed))
    assert verdict.outcome == "right", verdict
