"""What a generation returns: the sound, every intermediate of it, and how to make it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ldm2 import __version__, audio
from ldm2.settings import row_settings


@dataclass(frozen=True)
class Result:
    """n waveforms, prompt by prompt; within a prompt the best first where candidates were ranked.

    waveforms:   float32 numpy (n, N) at `sample_rate` Hz, within -1..1; (n, channels, N) of edits that keep the format
                 of their input, where its own samples stand unchanged (float64 if they are, see audio.read_channels)
    latents:     (n, C, T/4, F/4), the sampler's output, float32 on the CPU
    mel:         (n, T, F) log-mel, float32 on the CPU
    seeds:       the seed of each waveform
    scores:      CLAP similarity of each waveform with its prompt, or None where nothing was ranked
    settings:    the arguments that make all of it again, with the model, its revision and the version of ldm2
    encoding:    of files, where their format has it (see audio.write): that of an edit's input, so that what was kept
                 stays exact
    inputs:      files that `save` does not overwrite, whatever it is asked
    """

    waveforms: np.ndarray
    sample_rate: int
    latents: Tensor
    mel: Tensor
    seeds: list[int]
    scores: list[float] | None
    settings: dict
    encoding: str | None = None
    inputs: tuple[Path, ...] = ()

    def save(self, path: str | Path, overwrite: bool = False) -> list[Path]:
        """Write the waveforms in the format of the suffix, with their settings as a JSON comment inside.

        One waveform goes to `path`; several to name-1.wav, name-2.wav, ... Returns the paths written. Raises ValueError
        or OSError (folder missing, file exists or is an input, unknown suffix) before anything is written.
        """
        paths = output_paths(path, len(self.waveforms))
        channels = self.waveforms.shape[1] if self.waveforms.ndim == 3 else 1
        form = {"overwrite": overwrite, "encoding": audio.nearest_encoding(path, self.encoding)}
        for target in paths:
            audio.check_output(target, sample_rate=self.sample_rate, channels=channels, inputs=self.inputs, **form)
        for row, target in enumerate(paths):
            settings = row_settings(self.settings, row, self.seeds[row])
            tags = {"title": settings["prompt"], "software": f"ldm2 {__version__}", "comment": json.dumps(settings)}
            audio.write(target, self.waveforms[row], self.sample_rate, metadata=tags, **form)
        return paths


def output_paths(path: str | Path, count: int) -> list[Path]:
    """The file names of `count` waveforms saved to `path`."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, count + 1)]
