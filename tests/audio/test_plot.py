"""Pictures: a readable PNG, and what is refused."""

import builtins

import numpy as np
import pytest

from ldm2.audio import plot

SOUND = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 500, 8000])
def test_a_picture_is_written(tmp_path, length):
    from matplotlib.image import imread

    plot.compare(tmp_path / "x.png", SOUND[:length], SOUND[:length] / 2, 16_000)
    picture = imread(tmp_path / "x.png")
    assert picture.shape[1] > 2 * picture.shape[0] > 400
    assert picture.std() > 0.05


def test_a_sine_stands_at_its_frequency_and_level():
    tone = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    levels = plot._decibels(tone, 16_000)[:, 20]
    assert np.argmax(levels) == 64                         # bins of 1 / 64 ms = 15.625 Hz
    assert levels.max() == pytest.approx(-20, abs=0.1)


def test_a_name_that_is_taken_or_the_inputs_is_refused(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"x\.png exists already"):
        plot.compare(path, SOUND, SOUND, 16_000)
    with pytest.raises(ValueError, match=r"x\.png is the input"):
        plot.check_plot(path, overwrite=True, inputs=[path])
    with pytest.raises(ValueError, match=r"a plot is a \.png file, got 'x\.pdf'"):
        plot.check_plot("x.pdf")
    with pytest.raises(FileNotFoundError, match="none"):
        plot.check_plot(tmp_path / "none" / "x.png")
    assert path.read_bytes() == b"precious"


def test_without_matplotlib_its_installation_is_told(monkeypatch, tmp_path):
    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.check_plot(tmp_path / "x.png")
