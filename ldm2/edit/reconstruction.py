"""Reconstruction: a sound through the stages of the model and back, to see (and measure) which stage loses what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm2.edit import metrics
from ldm2.edit.edits import transfer
from ldm2.edit.masks import start_step
from ldm2.edit.sound import analyse, encode_audio, mel_config, open_sound
from ldm2.runtime.host import usual_numpy

if TYPE_CHECKING:
    from ldm2.pipeline import AudioLDM2

STAGES = ("vocoder", "vae", "diffusion")


@dataclass(frozen=True)
class Reconstruction:
    """Both float32 (N,) at the model's sample_rate (Hz). distances: see metrics.compare."""

    original: np.ndarray
    waveform: np.ndarray
    sample_rate: int
    distances: dict[str, float]


@usual_numpy
def reconstruct(
    pipe: AudioLDM2, sound: str | Path | np.ndarray | Tensor, stage: str = "vae", *, strength: float = 0.3,
    prompt: str | None = None, sample_rate: int | None = None, channel: int | None = None, **settings,
) -> Reconstruction:
    """A sound after the way to a stage and back.

    stage: "vocoder"    log-mel -> waveform
           "vae"        log-mel -> latents -> log-mel -> waveform
           "diffusion"  log-mel -> latents, noised to `strength` and denoised -> log-mel -> waveform
    strength, prompt, settings: of the last, as for `transfer`; without a prompt nothing but the input guides it
    sound, sample_rate, channel: as for `transfer`

    Raises ValueError or OSError, one line, for what cannot be read and for values out of range.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    start_step(strength, 1)                                # refuse an impossible one in any stage
    opened = open_sound(sound, sample_rate, channel)
    original = opened.at(pipe.sample_rate).astype(np.float32, copy=False)
    if stage == "vocoder":
        waveform = pipe.vocode(analyse(pipe, original[None]))[0]
    elif stage == "vae":
        waveform = pipe.vocode(pipe.decode(encode_audio(pipe, opened.mono, opened.sample_rate)))[0]
    else:
        made = transfer(pipe, opened.mono, prompt, strength=strength, sample_rate=opened.sample_rate, **settings)
        waveform = made.waveforms[0]
    waveform = np.asarray(waveform)[: len(original)]
    distances = metrics.compare(original, waveform, mel_config(pipe))
    return Reconstruction(original, waveform, pipe.sample_rate, distances)
