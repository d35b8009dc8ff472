"""What is said while it works: stages in order, a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest

import ldm2
from ldm2.runtime import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_generation_reports_its_stages_in_order(tiny_checkpoint):
    said = []
    pipe = ldm2.load(tiny_checkpoint, progress=lambda *event: said.append(event))
    assert [stage for stage, _, _ in said] == ["loading"] * 4
    said.clear()
    pipe.generate(["rain", "wind"], seconds=0.2, steps=3, seed=0, num_waveforms=2,
                  progress=lambda *event: said.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in said)) == [
        "reading the prompt", "denoising", "decoding", "vocoding", "ranking"]
    assert [done for stage, done, _ in said if stage == "denoising"] == [0, 1, 2, 3]
    assert {total for stage, _, total in said if stage == "decoding"} == {4}


def test_an_edit_reports_its_stages(tiny_checkpoint):
    said = []
    pipe = ldm2.load(tiny_checkpoint)
    pipe.transfer(pipe.generate("rain", seconds=0.2, steps=1, seed=0).waveforms, "wind", sample_rate=16_000, steps=2,
                  progress=lambda *event: said.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in said)) == [
        "reading the sound", "denoising", "decoding", "vocoding"]


def test_a_terminal_gets_one_bar_that_is_taken_away():
    file = Terminal()
    with progress.shown(True, file) as report:
        for done in range(4):
            report("denoising", done, 3)
        report("decoding", 0, 2)
    assert "denoising" in file.getvalue() and "3/3" in file.getvalue() and "0/2" in file.getvalue()
    assert file.getvalue().split("\r")[-1].strip() == ""


def test_a_log_gets_lines_once_it_takes_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with progress.shown(True, file) as report:
        report("reading the prompt", 0, 1)
        for done in range(5):
            report("denoising", done, 4)
            now[0] += 6
        report("decoding", 0, 2)
    assert file.getvalue().splitlines() == ["ldm2: denoising: 2 of 4, 12 s left", "ldm2: decoding ..."]


def test_a_job_that_is_done_at_once_says_nothing():
    file = io.StringIO()
    with progress.shown(True, file) as report:
        report("denoising", 1, 1)
    assert file.getvalue() == ""


@pytest.mark.parametrize("wrong", [3, "yes", [1]])
def test_what_is_no_progress_is_refused(wrong):
    with pytest.raises(ValueError, match="progress must be"), progress.shown(wrong):
        pass
