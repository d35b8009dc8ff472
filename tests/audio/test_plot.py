"""Pictures: a readable PNG, and what is refused."""

import builtins
import io
import sys

import numpy as np
import pytest
import torch

from ldm2.audio import plot, spectrogram
from ldm2.result import Result
from tests.helpers import tone

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
    levels = spectrogram.decibels(tone, 16_000)[:, 20]
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


def test_a_spectrogram_is_a_picture_with_low_frequencies_at_the_bottom_and_time_from_the_left():
    image = pytest.importorskip("PIL.Image")
    levels = np.zeros((8, 20), np.float32)                 # (frequency, time)
    levels[0, :10] = 5                                     # the first half of the lowest band is the loudest
    picture = image.open(io.BytesIO(spectrogram.png(levels)))
    assert picture.size == (640, 160)
    pixels = np.asarray(picture.convert("RGB"))
    assert pixels[-5, 5].tolist() == [252, 253, 191] and pixels[-5, -5].tolist() == pixels[5, 5].tolist() == [0, 0, 4]


@pytest.mark.parametrize("length", [1, 300, 20_000])
def test_any_waveform_has_a_picture_silence_too(length):
    image = pytest.importorskip("PIL.Image")
    for waveform in (np.zeros(length, np.float32), tone(length / 16_000)):
        assert image.open(io.BytesIO(spectrogram.waveform_png(waveform, 16_000))).size == (640, 160)


def test_a_result_in_a_notebook_has_a_picture_and_a_player_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # importing it raises ImportError
    one = Result(waveforms=np.zeros((2, 160), np.float32), sample_rate=16000, latents=torch.zeros(2, 8, 1, 16),
                 mel=torch.zeros(2, 4, 64), seeds=[0, 1], scores=None, settings={"prompt": "<b>", "seed": [0, 1]})
    page = one._repr_html_()
    assert page.count("<audio") == page.count("<img") == 2
    assert "<b>" not in page
