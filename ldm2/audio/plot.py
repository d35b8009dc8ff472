"""Pictures of sounds side by side. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm2 import atomic
from ldm2.audio.spectrogram import LOWEST, decibels
from ldm2.runtime.host import usual_numpy

WIDEST = 30.0                                              # dB of difference


def check_plot(path: str | Path, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Raise ImportError without matplotlib, OSError if the name is taken, ValueError for a suffix other than .png and
    for one of `inputs`, which `overwrite` does not allow either."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a plot is a .png file, got {str(path)!r}")
    atomic.check_writable(path, overwrite, inputs)


@usual_numpy
def compare(
    path: str | Path, original: np.ndarray, other: np.ndarray, sample_rate: int,
    names: tuple[str, str] = ("input", "output"), overwrite: bool = False,
) -> None:
    """Write a PNG of the spectrograms of two waveforms (N,) and of their difference side by side, in dB over s and Hz.

    Raises what `check_plot` raises, and ValueError for waveforms of different length.
    """
    check_plot(path, overwrite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if original.ndim != 1 or original.shape != other.shape:
        raise ValueError(f"two waveforms (N,) of one length are needed, got {original.shape} and {other.shape}")
    pictures = [decibels(waveform, sample_rate) for waveform in (original, other)]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    top = max(LOWEST + 20, *(float(picture.max()) for picture in pictures))
    extent = (0, len(original) / sample_rate, 0, sample_rate / 2)
    look = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    for ax, picture, name in zip(axes, pictures, names):
        image = ax.imshow(picture, cmap="magma", vmin=LOWEST, vmax=top, **look)
        ax.set_title(name)
    figure.colorbar(image, ax=axes[:2], label="dB of full scale", pad=0.01)
    image = axes[2].imshow(pictures[1] - pictures[0], cmap="RdBu_r", vmin=-WIDEST, vmax=WIDEST, **look)
    axes[2].set_title(f"{names[1]} minus {names[0]}")
    figure.colorbar(image, ax=axes[2], label="dB", pad=0.02)
    for ax in axes:
        ax.set_xlabel("time in s")
    axes[0].set_ylabel("frequency in Hz")
    with atomic.whole(Path(path), overwrite) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
