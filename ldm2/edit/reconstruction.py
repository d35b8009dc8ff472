"""Reconstruction: a sound through the stages of the model and back, to see (and measure) which stage loses what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm2.call import Call, takes_sound
from ldm2.edit import metrics
from ldm2.edit.edits import Source, check_duration, through_diffusion
from ldm2.edit.sound import open_sound
from ldm2.runtime.host import usual_numpy
from ldm2.runtime.progress import shown
from ldm2.settings import RECONSTRUCT

if TYPE_CHECKING:
    from ldm2.stages import Stages


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A sound before and after, both float32 (N,) at the model's sample_rate (Hz). distances: see metrics.compare."""

    original: np.ndarray
    waveform: np.ndarray
    sample_rate: int
    distances: dict[str, float]


@takes_sound(RECONSTRUCT, Call)
@usual_numpy
def reconstruct(stages: Stages, sound: Source, stage: str | None = None, *args: Any, **options: Any) -> Reconstruction:
    """A sound after the way to a stage and back.

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz)
    stage: "vocoder"    log-mel -> waveform
           "vae"        log-mel -> latents -> log-mel -> waveform
           "diffusion"  log-mel -> latents, noised to `strength` and denoised -> log-mel -> waveform

    The other options are for the stage diffusion; without a prompt nothing but the input guides it. Raises ValueError
    or OSError, one line, for what cannot be read and for values out of range.
    """
    call = Call.of(RECONSTRUCT, stages.origin, *args, stage=stage, **options)
    opened = open_sound(sound, call.sample_rate, call.channel)
    check_duration(opened.seconds)
    call = call.resolved(stages.defaults, duration=opened.seconds)
    original = opened.at(stages.sample_rate).astype(np.float32, copy=False)
    with shown(call.progress) as report:
        if call.stage == "vocoder":
            waveform = stages.vocode(stages.log_mel(original[None]), progress=report)[0]
        elif call.stage == "vae":
            latents = stages.encode_audio(opened.mono, opened.sample_rate)
            waveform = stages.vocode(stages.decode(latents, progress=report), progress=report)[0]
        else:
            waveform = through_diffusion(stages, opened, call, report)
    waveform = np.asarray(waveform)[: len(original)]
    distances = metrics.compare(original, waveform, stages.mel_config)
    return Reconstruction(original, waveform, stages.sample_rate, distances)
