"""Editing: a sound in, a sound out. Other content, parts made anew, a continuation, a higher band, variations.

Each function is a method of AudioLDM2 too: `pipe.inpaint(...)` is `inpaint(pipe, ...)`.

References: "SDEdit", arXiv:2108.01073, section 3 (a late start from the noised input); "AudioLDM", arXiv:2301.12503,
sections 3.4 and 3.5 (style transfer, inpainting and super-resolution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm2 import __version__, audio
from ldm2.edit.masks import Range, check_not_negative, keep_mask, masked, merge_ranges, start_step
from ldm2.edit.paste import CROSSFADE_SECONDS, blend_bands, extend_canvas, fit_length, paste
from ldm2.edit.sound import Sound, encode_audio, mel_config, open_sound
from ldm2.noise import SeededNoise
from ldm2.result import Result
from ldm2.runtime.host import usual_numpy
from ldm2.settings import MAX_SECONDS, Recipe, check_seconds, recipe

if TYPE_CHECKING:
    from ldm2.conditioning import Conditioning
    from ldm2.pipeline import AudioLDM2

Source = str | Path | np.ndarray | Tensor
SIDES = ("after", "before", "both")
ONE_DRAW = ("pndm", "lms")                                 # they extrapolate along the eps of earlier steps

# Joins an input (..., N) and the model's sound (N,), both at the rate (Hz) that is given.
Join = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@usual_numpy
def transfer(
    pipe: AudioLDM2, sound: Source, prompt: str | Sequence[str] | None, *, strength: float = 0.6,
    sample_rate: int | None = None, channel: int | None = None, keep_format: bool = False, **settings,
) -> Result:
    """The sound as the prompt would have it: noised to some level and denoised from there.

    sound:       a file, or samples (N,) or (channels, N) with their sample_rate (Hz)
    prompt:      what to hear; None for no guidance by words
    strength:    0 returns the reconstruction of the input, 1 ignores all of it but its length
    channel:     index of the channel that the model hears, None for the mean of all
    keep_format: give the result the rate and the number of channels of the input, not one channel at the model's rate
    settings:    as of AudioLDM2.generate: negative_prompt, steps, guidance_scale, sampler, eta, seed, num_waveforms,
                 transcription, phonemes, window, overlap, prompt_at, preset, guidance_interval, reuse, spacing,
                 callback, progress

    Raises ValueError or OSError, one line, for what cannot be read and for values out of range.
    """
    opened = open_sound(sound, sample_rate, channel)
    job = _Job.of(pipe, opened, prompt, settings, task="transfer", strength=strength, channel=channel,
                  keep_format=keep_format)
    start = start_step(strength, job.asked.steps)
    latents = job.sample(encode_audio(pipe, opened.mono, opened.sample_rate), start=start)
    return job.result(latents, _replace, keep_format)


def variations(
    pipe: AudioLDM2, sound: Source, prompt: str | Sequence[str] | None = None, *, strength: float = 0.5,
    num_waveforms: int = 3, **settings,
) -> Result:
    """Sounds that resemble the input, each with a seed of its own: `transfer` that needs no prompt."""
    return transfer(pipe, sound, prompt, strength=strength, num_waveforms=num_waveforms, **settings)


@usual_numpy
def inpaint(
    pipe: AudioLDM2, sound: Source, prompt: str | Sequence[str] | None, *, times: Sequence[Range] | None = None,
    bands: Sequence[Range] | None = None, soft_seconds: float = 0.0, soft_hz: float = 0.0,
    crossfade: float = CROSSFADE_SECONDS, paste: bool = True, sample_rate: int | None = None,
    channel: int | None = None, keep_format: bool = False, **settings,
) -> Result:
    """Parts of the sound made anew: what lies in one of `times` and in one of `bands`.

    times, bands: ranges (from, to) in seconds and in Hz, None in them for the beginning or the end; None for all times
                  or all bands, but not for both. Those that overlap are joined.
    soft_seconds, soft_hz: length of the ramps of the mask inside the ranges, see `masks.keep_mask`
    crossfade:    seconds over which input and new sound fade into each other, inside the ranges
    paste:        outside the ranges of time take every sample from the input, outside the bands its spectrum; False
                  returns what the model makes of everything
    The others are those of `transfer`. Files of the result keep the precision of the input's.
    """
    if times is None and bands is None:
        raise ValueError("nothing to make anew: give ranges of seconds (times), of Hz (bands), or both")
    check_lengths(soft_seconds=soft_seconds, soft_hz=soft_hz, crossfade=crossfade)
    opened = open_sound(sound, sample_rate, channel)
    ranges = {
        "times": None if times is None else merge_ranges(times, opened.seconds),
        "bands": None if bands is None else merge_ranges(bands, mel_config(pipe).f_max, "Hz"),
    }
    soft = {"soft_seconds": soft_seconds, "soft_hz": soft_hz}
    options = {"crossfade": crossfade, "paste": paste, "channel": channel, "keep_format": keep_format}
    job = _Job.of(pipe, opened, prompt, settings, task="inpaint", **ranges, **soft, **options)
    join = _joining(opened, crossfade=crossfade, **ranges) if paste else _replace
    return job.masked(opened.mono, ranges | soft, join, keep_format)


@usual_numpy
def extend(
    pipe: AudioLDM2, sound: Source, prompt: str | Sequence[str] | None, *, seconds: float = 10.0, side: str = "after",
    crossfade: float = CROSSFADE_SECONDS, paste: bool = True, sample_rate: int | None = None,
    channel: int | None = None, keep_format: bool = False, **settings,
) -> Result:
    """The sound with `seconds` more after it, before it, or on both sides (then as many on each).

    The new part begins a crossfade inside the input. The others are those of `inpaint`.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    check_lengths(crossfade=crossfade)
    opened, seconds = open_sound(sound, sample_rate, channel), check_seconds(seconds)
    before, after = (seconds if side in (name, "both") else 0.0 for name in ("before", "after"))
    canvas, times = extend_canvas(opened.channels, opened.sample_rate, before, after, crossfade)
    margins = [audio.seconds_to_samples(part, opened.sample_rate) for part in (before, after)]
    longer = replace(opened, channels=canvas, mono=np.pad(opened.mono, margins))
    options = {"crossfade": crossfade, "paste": paste, "channel": channel, "keep_format": keep_format}
    job = _Job.of(pipe, longer, prompt, settings, task="extend", extension=seconds, side=side, **options)
    join = _joining(longer, times, None, crossfade) if paste else _replace
    mirrored = np.pad(opened.mono, margins, mode="reflect")                  # silence would leak into the last latents
    return job.masked(mirrored, {"times": times}, join, keep_format)


@usual_numpy
def super_resolution(
    pipe: AudioLDM2, sound: Source, prompt: str | Sequence[str] | None = None, *, above: float, soft_hz: float = 0.0,
    paste: bool = True, sample_rate: int | None = None, channel: int | None = None, keep_format: bool = False,
    **settings,
) -> Result:
    """The sound with everything above `above` (Hz) made anew, and its own spectrum below.

    Without a prompt the model follows the part below alone. The others are those of `inpaint`.
    """
    check_lengths(above=above, soft_hz=soft_hz)
    highest = mel_config(pipe).f_max
    if above >= highest:
        raise ValueError(f"above must be below {highest:g} Hz, the highest frequency of the model, got {above:g}")
    opened = open_sound(sound, sample_rate, channel)
    bands = merge_ranges([(above, None)], highest, "Hz")
    if keep_format and above >= opened.sample_rate / 2:
        raise ValueError(f"nothing above {above:g} Hz fits into the input's own {opened.sample_rate} Hz: keep_format "
                         f"would throw the new band away")
    options = {"soft_hz": soft_hz, "paste": paste, "channel": channel, "keep_format": keep_format}
    job = _Job.of(pipe, opened, prompt, settings, task="super_resolution", above=above, **options)
    join = _joining(opened, None, bands) if paste else _replace
    return job.masked(opened.mono, {"bands": bands, "soft_hz": soft_hz}, join, keep_format)


def check_lengths(**lengths: float) -> None:
    """Refuse what is no number of seconds or Hz from 0 up, by its name: crossfade, soft_seconds, soft_hz, above."""
    for name, value in lengths.items():
        check_not_negative(name, value)


def check_duration(seconds: float) -> None:
    """Raises ValueError for more sound than an edit takes."""
    if seconds > MAX_SECONDS:
        raise ValueError(f"an edit makes at most {MAX_SECONDS:g} s of sound, asked are {seconds:g} s: cut the input")


def _replace(original: np.ndarray, edited: np.ndarray, sample_rate: int) -> np.ndarray:
    """The model's sound in all channels."""
    return np.broadcast_to(edited, original.shape).astype(np.float32)


def _joining(
    sound: Sound, times: Sequence[Range] | None, bands: Sequence[Range] | None, crossfade: float = CROSSFADE_SECONDS
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
    """An edit that is under way: what is asked for, of which sound.

    prompted: whether words guide it. watch: callback and progress. edit: what the result says of the edit.
    """

    pipe: AudioLDM2
    sound: Sound
    asked: Recipe
    prompted: bool
    watch: dict
    edit: dict

    @classmethod
    def of(
        cls, pipe: AudioLDM2, sound: Sound, prompt: str | Sequence[str] | None, settings: dict, **edit: object
    ) -> _Job:
        """Check the settings. Raises ValueError for what an edit cannot do."""
        check_duration(sound.seconds)
        watch = {name: settings[name] for name in ("callback", "progress") if name in settings}
        settings = {name: value for name, value in settings.items() if name not in watch}
        if settings.get("loop"):
            raise ValueError("loop is for new sounds: an edit keeps the ends that it finds")
        defaults = pipe.defaults | ({"guidance_scale": 1.0} if prompt is None else {})
        asked = recipe("sound" if prompt is None else prompt, seconds=sound.seconds, defaults=defaults, **settings)
        for name in ("negative_prompt", "prompt_at", "guidance_scale"):
            if prompt is None and (asked.guided if name == "guidance_scale" else settings.get(name)):
                raise ValueError(f"{name} {settings[name]!r} needs a prompt: without one there is no guidance")
        name = None if sound.path is None else sound.path.name
        return cls(pipe, sound, asked, prompt is not None, watch, edit | {"input": name})

    def masked(self, heard: np.ndarray, mask: dict, join: Join, keep_format: bool) -> Result:
        """Make anew what `mask` (arguments of keep_mask) names of the sound that the model hears, and join it."""
        pipe, (original, rate) = self.pipe, self._base(keep_format)
        join(original, np.zeros(original.shape[-1], np.float32), rate)       # refuse now what could not be joined later
        x0 = encode_audio(pipe, heard, self.sound.sample_rate)
        keep = keep_mask(x0.shape[2], self.sound.seconds, mel_config(pipe), pipe.vae.config.downsampling, **mask)
        return self.result(self.sample(x0, keep=keep.to(x0)), join, keep_format)

    def sample(self, x0: Tensor, *, start: int = 0, keep: Tensor | None = None) -> Tensor:
        """Latents (rows, C, T/f, F/f) from those of the input x0 (1, C, T/f, F/f), of which nothing enters if all steps
        are taken and no mask `keep` keeps anything."""
        pipe, asked, noise = self.pipe, self.asked, SeededNoise(self.asked.seeds)
        x0 = x0.expand(len(asked.seeds), -1, -1, -1)
        latents, edit = noise.draw(*x0.shape[1:]), None
        if keep is not None:
            edit = masked(x0, keep, _one_draw(noise) if asked.sampler in ONE_DRAW else noise)
        changes = [seconds for seconds, _ in asked.prompt_at]
        return pipe.denoise(
            *self._conditionings(), latents=latents, steps=asked.steps, guidance_scale=asked.guidance_scale,
            sampler=asked.sampler, eta=asked.eta, guidance_interval=asked.guidance_interval, reuse=asked.reuse,
            spacing=asked.spacing, noise=noise, x0=x0 if start else None, start=start, edit=edit,
            windows=pipe.windows(x0.shape[2], asked.window, asked.overlap, changes=changes), **self.watch,
        )

    def _conditionings(self) -> tuple[Conditioning, Conditioning | None]:
        """Both sides of guidance; without a prompt the unconditional one alone."""
        if self.prompted:
            return self.pipe.conditionings(self.asked)
        speech = {"transcription": self.asked.transcription, "phonemes": self.asked.phonemes}
        with self.pipe.stages["text"]:
            unconditional = self.pipe.encode_unconditional(self.pipe.encode(self.asked.prompts, **speech), **speech)
        return unconditional.repeat(self.asked.num_waveforms), None

    def result(self, latents: Tensor, join: Join, keep_format: bool) -> Result:
        """Latents -> sound, joined with the input; candidates best first by what the model made."""
        pipe, asked = self.pipe, self.asked
        original, rate = self._base(keep_format)
        mel = pipe.decode(latents)
        num_samples = self.sound.at(pipe.sample_rate).shape[-1]
        made = pipe.vocode(mel)[:, :num_samples].numpy()
        order, scores = list(range(len(made))), None
        if asked.num_waveforms > 1 and self.prompted:
            order, scores = pipe.rank(made, asked.prompts)
        at_rate = fit_length(audio.resample(made, pipe.sample_rate, rate), original.shape[-1])
        settings = asked.settings | pipe.origin | {"ldm2": __version__, "edit": self.edit}
        return Result(
            waveforms=np.stack([join(original, at_rate[row], rate) for row in order]), sample_rate=rate,
            latents=latents[order].cpu(), mel=mel[order, 0].float().cpu(), seeds=[asked.seeds[row] for row in order],
            scores=scores, settings=settings if self.prompted else settings | {"prompt": ""},
            encoding=self.sound.encoding, inputs=() if self.sound.path is None else (self.sound.path,),
        )

    def _base(self, keep_format: bool) -> tuple[np.ndarray, int]:
        """What the result is joined to: the input's channels at its rate, or what the model hears at the model's."""
        if keep_format:
            return self.sound.channels, self.sound.sample_rate
        return self.sound.at(self.pipe.sample_rate), self.pipe.sample_rate


def _one_draw(noise: SeededNoise) -> Callable[[Tensor], Tensor]:
    """The same noise each time."""
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        if not drawn:
            drawn.append(noise(like))
        return drawn[0]

    return draw
