"""Which part of a sound is made anew, and how a sampler keeps the rest.

A part is given by ranges in seconds, in Hz, or both. A sampler works on the latent grid, where the kept part is a mask
(1 keep, 0 make anew).

Reference: "AudioLDM", arXiv:2301.12503, section 3.4 (inpainting and super-resolution by masked sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ldm2.mel import MelConfig, hz_to_mel, mel_to_hz
from ldm2.option_kinds import Range
from ldm2.options import check_number
from ldm2.samplers import Step


def merge_ranges(ranges: Sequence[Range], end: float, unit: str = "s") -> tuple[tuple[float, float], ...]:
    """Ranges within 0..end, in order; those that overlap or touch are joined.

    Raises ValueError, naming the range, if there is none, or if one is backwards, empty, outside 0..end or no numbers.
    """
    checked = []
    for start, stop in ranges:
        start, stop = (0.0 if start is None else start), (end if stop is None else stop)
        for value in (start, stop):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"a range must be two finite numbers of {unit}, got {value!r}")
        if start < 0 or stop > end:
            raise ValueError(f"the range {start:.9g}:{stop:.9g} {unit} is not within 0:{end:.9g} {unit}")
        if start >= stop:
            raise ValueError(f"the range {start:.9g}:{stop:.9g} {unit} must end after it begins")
        checked.append((float(start), float(stop)))
    if not checked:
        raise ValueError("at least one range is needed")
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(checked):
        if merged and start <= merged[-1][1]:
            start, stop = merged[-1][0], max(stop, merged.pop()[1])
        merged.append((start, stop))
    return tuple(merged)


def start_step(strength: float, steps: int) -> int:
    """The step to start from for a strength from 0 (nothing is changed: `steps`) to 1 (from pure noise: 0).

    Raises ValueError if the strength is out of range.
    """
    check_number("strength", strength, 0, 1)
    return steps - round(strength * steps)


# --- the latent grid -------------------------------------------------------------------------------------------------

def keep_mask(num_frames: int, seconds: float, config: MelConfig, vae_factor: int, *,
              times: Sequence[Range] | None = None, bands: Sequence[Range] | None = None,
              soft_seconds: float = 0.0, soft_hz: float = 0.0) -> Tensor:
    """Mask of the latents of a sound, float32 (1, 1, num_frames, num_mels / vae_factor): 1 keep, 0 make anew.

    What lies in one of `times` (s) and in one of `bands` (Hz) is made anew; None means all times, or all bands. Every
    cell that a range reaches into belongs to it. The authors make anew what lies in either: that is the product of two
    masks, one of times and one of bands.

    num_frames:  latent frames, of vae_factor * config.hop_length samples each
    seconds:     length of the sound. A range that reaches its end goes on to the end of the grid.
    soft_seconds, soft_hz: length of the linear ramp inside each border of a range, at most a quarter of the range

    Raises ValueError for impossible ranges, a negative ramp or mel bins that do not fill latent ones.
    """
    if config.num_mels % vae_factor:
        raise ValueError(f"num_mels must be a multiple of vae_factor, got {config.num_mels} and {vae_factor}")
    check_number("soft_seconds", soft_seconds, 0)
    check_number("soft_hz", soft_hz, 0)
    anew = np.ones((num_frames, config.num_mels // vae_factor))
    if times is not None:
        frame_edges = np.arange(num_frames + 1) * (vae_factor * config.hop_length / config.sample_rate)
        ranges = without_outer_borders(merge_ranges(times, seconds), 0.0, seconds)
        anew *= soft_membership(frame_edges[:-1], frame_edges[1:], ranges, soft_seconds)[:, None]
    if bands is not None:
        bin_edges = _latent_bin_edges(config, vae_factor)
        ranges = without_outer_borders(merge_ranges(bands, config.f_max, "Hz"), config.f_min, config.f_max)
        anew *= soft_membership(bin_edges[:-1], bin_edges[1:], ranges, soft_hz)[None, :]
    return torch.from_numpy(1 - anew).float()[None, None]


def _latent_bin_edges(config: MelConfig, vae_factor: int) -> np.ndarray:
    """Borders in Hz between latent bins, (num_mels / vae_factor + 1,): halfway, in mel, between two filters' peaks."""
    low, high = hz_to_mel(torch.tensor([config.f_min, config.f_max], dtype=torch.float64, device="cpu"))
    filters_below = torch.arange(0, config.num_mels + 1, vae_factor, dtype=torch.float64, device="cpu")
    edges = mel_to_hz(low + (filters_below + 0.5) * (high - low) / (config.num_mels + 1)).numpy()
    edges[0], edges[-1] = config.f_min, config.f_max
    return edges


def without_outer_borders(ranges: Sequence[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Ranges that reach low or high go on for ever: there is nothing beyond to be joined to, so no ramp either."""
    return [(-math.inf if a <= low else a, math.inf if b >= high else b) for a, b in ranges]


def soft_membership(
    starts: np.ndarray, ends: np.ndarray, ranges: Sequence[tuple[float, float]], soft: float
) -> np.ndarray:
    """How far each cell, starts[i] to ends[i], belongs to the ranges: 0..1, rising over `soft` inside each border."""
    tolerance = 1e-9 * max(1.0, float(ends[-1]))
    share = np.zeros(len(starts))
    for a, b in ranges:
        depth = np.minimum(ends - a, b - starts)                             # how far the cell reaches into the range
        ramp = max(min(soft, (b - a) / 4), tolerance)
        share = np.maximum(share, np.where(depth > tolerance, np.minimum(depth / ramp, 1), 0))
    return share


def masked(x0: Tensor, keep: Tensor, noise: Callable[[Tensor], Tensor]) -> Callable[[Step], Tensor]:
    """The `edit` of ldm2.samplers.sample that holds what `keep` (1 keep) keeps near the clean latents x0 (B, C, T, F).

    Before each step the kept part of x_t is replaced by x0 with fresh noise of that step's level, from
    noise(like) -> standard normal.
    """
    def edit(step: Step) -> Tensor:
        return keep * (step.signal * x0 + step.sigma * noise(x0)) + (1 - keep) * step.x_t

    return edit
