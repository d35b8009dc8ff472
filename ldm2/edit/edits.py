"""Editing: a sound in, a sound out. Other content, parts regenerated, a continuation, a higher band, variations.

Each function is a method of AudioLDM2: `pipe.inpaint(...)` is `inpaint(pipe, ...)`.

References: "SDEdit", arXiv:2108.01073, section 3 (a late start from the noised input); "AudioLDM", arXiv:2301.12503,
sections 3.4 and 3.5 (style transfer, inpainting and super-resolution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ldm2 import audio
from ldm2.call import Call, takes_sound
from ldm2.edit.masks import keep_mask, masked, merge_ranges, start_step
from ldm2.edit.paste import blend_bands, extend_canvas, fit_length, paste
from ldm2.edit.sound import Sound, open_sound
from ldm2.noise import SeededNoise
from ldm2.option_kinds import Range
from ldm2.options import exact
from ldm2.result import Result, collect
from ldm2.runtime.host import usual_numpy
from ldm2.runtime.progress import Progress, shown
from ldm2.settings import EXTEND, INPAINT, MAX_SECONDS, SUPER_RESOLUTION, TRANSFER, VARIATIONS
from ldm2.stages import Init

if TYPE_CHECKING:
    from ldm2.stages import Stages

Source = str | Path | np.ndarray | Tensor | Sound
ONE_DRAW = ("pndm", "lms")                                 # they extrapolate along the eps of earlier steps

# Joins an input (..., N) and the model's sound (N,), both at the rate (Hz) that is given.
Join = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@takes_sound(TRANSFER, Call)
@usual_numpy
def transfer(stages: Stages, sound: Source, *args: Any, **options: Any) -> Result:
    """The sound as the prompt would have it: noised to some level and denoised from there.

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz)

    Raises ValueError or OSError, one line, for what cannot be read and for values out of range.
    """
    return _noised(stages, sound, Call.of(TRANSFER, stages.origin, *args, **options))


@takes_sound(VARIATIONS, Call)
@usual_numpy
def variations(stages: Stages, sound: Source, *args: Any, **options: Any) -> Result:
    """Sounds that resemble the input, each with a seed of its own: `transfer` that needs no prompt.

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz)

    Raises ValueError or OSError, one line, for what cannot be read and for values out of range.
    """
    return _noised(stages, sound, Call.of(VARIATIONS, stages.origin, *args, **options))


def _noised(stages: Stages, sound: Source, call: Call) -> Result:
    """Noise a sound to the strength and denoise it."""
    job = _Job.of(stages, sound, call)
    start = start_step(job.call.strength, job.call.steps)
    with shown(job.call.progress) as report:
        report("reading the sound", 0, 1)
        x0 = stages.encode_audio(job.sound.mono, job.sound.sample_rate)
        return job.result(job.sample(x0, report, start=start), _replace, report)


@takes_sound(INPAINT, Call)
@usual_numpy
def inpaint(stages: Stages, sound: Source, *args: Any, **options: Any) -> Result:
    """Parts of the sound regenerated: what lies in one of `times` and in one of `bands`.

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz). Files of the result keep its precision.

    Outside the times every sample is the input's, outside the bands its spectrum, unless paste=False. Ranges that
    overlap are joined. Raises ValueError or OSError, one line, for what cannot be read and for values out of range.
    """
    job = _Job.of(stages, sound, Call.of(INPAINT, stages.origin, *args, **options))
    call = job.call
    times = None if call.times is None else merge_ranges(call.times, job.sound.seconds)
    bands = None if call.bands is None else merge_ranges(call.bands, stages.mel_config.f_max, "Hz")
    mask = {"times": times, "bands": bands, "soft_seconds": call.soft_seconds, "soft_hz": call.soft_hz}
    return job.masked(job.sound.mono, mask, _joining(job.sound, times, bands, call.crossfade))


@takes_sound(EXTEND, Call)
@usual_numpy
def extend(stages: Stages, sound: Source, *args: Any, **options: Any) -> Result:
    """The sound with `seconds` more after it, before it, or on both sides (then as many on each).

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz). Files of the result keep its precision.

    The new part begins a crossfade inside the input. Raises ValueError or OSError, one line, for what cannot be read
    and for values out of range.
    """
    call = Call.of(EXTEND, stages.origin, *args, **options)
    opened, known = open_sound(sound, call.sample_rate, call.channel), call.resolved({}, duration=MAX_SECONDS)
    before, after = (known.seconds if known.side in (name, "both") else 0.0 for name in ("before", "after"))
    canvas, times = extend_canvas(opened.channels, opened.sample_rate, before, after, known.crossfade)
    margins = [audio.seconds_to_samples(part, opened.sample_rate) for part in (before, after)]
    longer = replace(opened, channels=canvas, mono=np.pad(opened.mono, margins))
    job = _Job.of(stages, longer, call)
    mirrored = np.pad(opened.mono, margins, mode="reflect")                  # silence would leak into the last latents
    return job.masked(mirrored, {"times": times}, _joining(longer, times, None, known.crossfade))


@takes_sound(SUPER_RESOLUTION, Call)
@usual_numpy
def super_resolution(stages: Stages, sound: Source, *args: Any, **options: Any) -> Result:
    """The sound with everything above `above` (Hz) regenerated, and its own spectrum below.

    sound: a file, or samples (N,) or (channels, N) with their sample_rate (Hz). Files of the result keep its precision.

    Without a prompt the model follows the part below alone. Raises ValueError or OSError, one line, for what cannot be
    read and for values out of range.
    """
    call = Call.of(SUPER_RESOLUTION, stages.origin, *args, **options)
    highest = stages.mel_config.f_max
    if call.above is not None and call.above >= highest:
        raise ValueError(f"above must be below {highest:g} Hz, the highest frequency of the model, got "
                         f"{exact(call.above)}")
    job = _Job.of(stages, sound, call)
    if call.keep_format and call.above >= job.sound.sample_rate / 2:
        raise ValueError(f"nothing above {exact(call.above)} Hz fits into the input's own {job.sound.sample_rate} Hz: "
                         f"keep_format would throw the new band away")
    bands = merge_ranges([(call.above, None)], highest, "Hz")
    return job.masked(job.sound.mono, {"bands": bands, "soft_hz": call.soft_hz}, _joining(job.sound, None, bands, 0.0))


def through_diffusion(stages: Stages, sound: Sound, call: Call, report: Progress) -> np.ndarray:
    """A sound noised to the strength and denoised, (N,) at the model's rate: what `reconstruct` compares it with."""
    job = _Job(stages, sound, call)
    x0 = stages.encode_audio(sound.mono, sound.sample_rate)
    latents = job.sample(x0, report, start=start_step(call.strength, call.steps))
    return stages.vocode(stages.decode(latents, progress=report), progress=report)[0].numpy()


def check_duration(seconds: float) -> None:
    """Raises ValueError for more sound than an edit takes."""
    if seconds > MAX_SECONDS:
        raise ValueError(f"edits are limited to {MAX_SECONDS:g} s, got {exact(seconds)} s: shorten the input")


def _replace(original: np.ndarray, edited: np.ndarray, sample_rate: int) -> np.ndarray:
    """The model's sound in all channels."""
    return np.broadcast_to(edited, original.shape).astype(np.float32)


def _joining(
    sound: Sound, times: Sequence[Range] | None, bands: Sequence[Range] | None, crossfade: float
) -> Join:
    """The join that keeps the input outside the times and the bands."""
    if times is not None:                                  # at another rate the sound is a fraction of a sample longer
        times = [(a, None if b is not None and b >= sound.seconds else b) for a, b in times]

    def join(original: np.ndarray, edited: np.ndarray, sample_rate: int) -> np.ndarray:
        if bands is not None:
            edited = blend_bands(original, edited, _within(bands, sample_rate / 2), sample_rate)
        return edited if times is None else paste(original, edited, times, sample_rate, crossfade)

    return join


def _within(bands: Sequence[Range], half_rate: float) -> list[Range]:
    """What a sample rate can hold of the bands (Hz). Raises ValueError if that is nothing."""
    kept = [(a, min(b, half_rate)) for a, b in bands if a < half_rate]
    if not kept:
        raise ValueError(f"the bands {', '.join(f'{a:g}:{b:g}' for a, b in bands)} Hz lie above {half_rate:g} Hz, the "
                         f"highest frequency of the result")
    return kept


@dataclass(frozen=True)
class _Job:
    """An edit that is under way: what is asked for (resolved), of which sound."""

    stages: Stages
    sound: Sound
    call: Call

    @classmethod
    def of(cls, stages: Stages, sound: Source, call: Call) -> _Job:
        """Open the sound and check the settings. Raises ValueError for what an edit cannot do."""
        opened = open_sound(sound, call.sample_rate, call.channel) if not isinstance(sound, Sound) else sound
        check_duration(opened.seconds)
        resolved = call.resolved(stages.defaults, duration=opened.seconds)
        resolved = replace(resolved, lora=stages.adapters.pinned(resolved.lora))
        stages.warn_unranked(resolved)
        return cls(stages, opened, resolved)

    def masked(self, heard: np.ndarray, mask: dict, join: Join) -> Result:
        """Regenerate what `mask` (arguments of keep_mask) names of the sound that the model hears, and join it."""
        stages, (original, rate) = self.stages, self._base()
        join = join if self.call.paste else _replace
        join(original, np.zeros(original.shape[-1], np.float32), rate)       # refuse now what could not be joined later
        with shown(self.call.progress) as report:
            report("reading the sound", 0, 1)
            x0 = stages.encode_audio(heard, self.sound.sample_rate)
            factor = stages.vae.config.downsampling
            keep = keep_mask(x0.shape[2], self.sound.seconds, stages.mel_config, factor, **mask)
            return self.result(self.sample(x0, report, keep=keep.to(x0)), join, report)

    def sample(self, x0: Tensor, report: Progress, *, start: int = 0, keep: Tensor | None = None) -> Tensor:
        """Latents (rows, C, T/f, F/f) from those of the input x0 (1, C, T/f, F/f), of which nothing enters if all steps
        are taken and no mask `keep` keeps anything."""
        stages, call, noise = self.stages, self.call, SeededNoise(self.call.seeds)
        x0 = x0.expand(len(call.seeds), -1, -1, -1)
        latents, edit = noise.draw(*x0.shape[1:]), None
        if keep is not None:
            edit = masked(x0, keep, _one_draw(noise) if call.sampler in ONE_DRAW else noise)
        changes = [seconds for seconds, _ in call.prompt_at]
        windows = stages.windows(x0.shape[2], call.window, call.overlap, changes=changes)
        init = Init(x0 if start else None, start, edit)
        with stages.adapters.hold(call.lora):
            return stages.denoise(*stages.conditionings(call), latents, call, noise=noise, windows=windows, init=init,
                                  callback=call.callback, progress=report)

    def result(self, latents: Tensor, join: Join, report: Progress) -> Result:
        """Latents -> sound, joined with the input; candidates best first by what the model made."""
        stages, (original, rate) = self.stages, self._base()
        mel = stages.decode(latents, progress=report)
        num_samples = self.sound.at(stages.sample_rate).shape[-1]
        made = stages.vocode(mel, progress=report)[:, :num_samples].numpy()

        def finish(waveform: np.ndarray) -> np.ndarray:
            at_rate = fit_length(audio.resample(waveform, stages.sample_rate, rate), original.shape[-1])
            return join(original, at_rate, rate)

        return collect(stages, self.call, made, latents, mel, report, finish, sample_rate=rate,
                       encoding=self.sound.encoding, origin=_origin(self.sound),
                       inputs=() if self.sound.path is None else (self.sound.path,))

    def _base(self) -> tuple[np.ndarray, int]:
        """What the result is joined to: the input's channels at its rate, or what the model hears at the model's."""
        if self.call.keep_format:
            return self.sound.channels, self.sound.sample_rate
        return self.sound.at(self.stages.sample_rate), self.stages.sample_rate


def _origin(sound: Sound) -> dict[str, str]:
    """Which file an edit was made of: its path, and a digest of what was in it."""
    if sound.path is None:
        return {}
    return {"input": str(sound.path), "input_sha256": str(sound.sha256)}


def _one_draw(noise: SeededNoise) -> Callable[[Tensor], Tensor]:
    """A source of noise that draws once and returns the same numbers each time."""
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        if not drawn:
            drawn.append(noise(like))
        return drawn[0]

    return draw
