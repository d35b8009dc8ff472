"""Sounds longer than the denoiser's own length, loops, and prompts that change over time: the timeline is covered by
overlapping windows whose predictions are averaged at every step. Samplers see one denoiser for the whole timeline.

Reference: "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", arXiv:2302.08113, equation 5 (the
average) and section 4.2 (regions with prompts of their own). All our samplers are linear in the prediction, so that
averaging predictions is averaging steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ldm2.samplers.core import Denoiser


@dataclass(frozen=True)
class Window:
    """A stretch of the timeline that a model sees at once.

    frames:  (W,) indices into the timeline, in order; in a loop they continue at the start after the end
    weights: (W,) float32, the share of this window in the result at these frames; over all windows they sum to one
    prompt:  which of the prompts over time it is conditioned on
    """

    frames: Tensor
    weights: Tensor
    prompt: int = 0

    def to(self, device: torch.device) -> Window:
        """This window with its tensors on a device."""
        return replace(self, frames=self.frames.to(device), weights=self.weights.to(device))


def plan(
    num_frames: int, window: int, overlap: int, *, loop: bool = False, borders: Sequence[float] = (0,)
) -> list[Window]:
    """Windows over a timeline of `num_frames`, evenly spread; all of the same width, at most `window`.

    overlap: frames that neighbours share at least (and over which prompts fade into each other)
    loop:    the timeline is a circle. It takes two windows at least, because one alone has ends that do not meet; the
             joint lies in the middle of the first. No window holds a frame twice: the model would take the repetition
             of the noise for a structure of the sound.
    borders: (P,) the frames from which each prompt holds, ascending from 0. A window is there once for each prompt that
             has a share in it.

    Raises ValueError unless 0 <= overlap < window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be at least 0 and shorter than the window of {window} frames, got {overlap}")
    width = min(window, num_frames)
    if loop:
        count = max(2, math.ceil(num_frames / (window - overlap)))
        starts = [round(i * num_frames / count) - width // 2 for i in range(count)]
    else:
        count = max(1, math.ceil((num_frames - overlap) / (window - overlap)))
        starts = [round(i * (num_frames - width) / max(1, count - 1)) for i in range(count)]
    places = [torch.arange(start, start + width, device="cpu") % num_frames for start in starts]
    middle = torch.arange(width, dtype=torch.float64, device="cpu") + 0.5
    shape = torch.sin(math.pi * middle / width) ** 2       # Hann, never zero
    total = torch.zeros(num_frames, dtype=torch.float64, device="cpu")
    for frames in places:
        total[frames] += shape
    prompts = enumerate(shares(num_frames, borders, overlap, loop))
    parts = [(frames, shape / total[frames] * share[frames], j) for j, share in prompts for frames in places]
    return [Window(frames, weights.float(), j) for frames, weights, j in parts if weights.any()]


def shares(num_frames: int, borders: Sequence[float], fade: int, loop: bool = False) -> Tensor:
    """The share of each prompt in each frame, (P, T) float64; they sum to one over the prompts.

    Prompt j holds from borders[j] to borders[j + 1]; around a border the two fade linearly over `fade` frames. In a
    loop the last one fades into the first at the joint.
    """
    middle = torch.arange(num_frames, dtype=torch.float64, device="cpu") + 0.5
    fade = min(max(fade, 1), num_frames)

    def after(border: float) -> Tensor:
        return ((middle - border) / fade + 0.5).clamp(0, 1)

    edges: list[float] = [-math.inf, *borders[1:], math.inf]
    turns: tuple[int, ...] = (0,)
    if loop:
        edges, turns = [*borders, num_frames], (-num_frames, 0, num_frames)
    pairs, nothing = pairwise(edges), torch.zeros_like(middle)
    return torch.stack([sum((after(a + turn) - after(b + turn) for turn in turns), nothing) for a, b in pairs])


def average(
    windows: Sequence[Window], denoisers: Callable[[tuple[int, ...]], Denoiser], at_once: int = 1
) -> Denoiser:
    """A denoiser of the whole timeline, x_t (B, C, T, F) -> float32, by the weighted mean of those of its windows.

    denoisers: denoisers(prompts) -> the denoiser of len(prompts) windows below each other, (len(prompts) * B, C, W, F),
               of which window i has the conditioning of prompts[i]. Asked for once for each model call of a step: what
               a denoiser remembers is of its own windows.
    at_once:   windows in one model call. Memory grows with it and not with the length.
    The windows must be on the device of x_t.
    """
    groups = [windows[i : i + at_once] for i in range(0, len(windows), at_once)]
    calls = [(group, denoisers(tuple(window.prompt for window in group))) for group in groups]

    def denoise(x: Tensor, t: float) -> Tensor:
        result = torch.zeros_like(x, dtype=torch.float32)
        for group, denoiser in calls:
            parts = torch.cat([x[:, :, window.frames] for window in group])
            predictions = denoiser(parts, t)
            for window, prediction in zip(group, predictions.float().chunk(len(group)), strict=True):
                weighted = prediction * window.weights[:, None]
                result.index_add_(2, window.frames, weighted)
        return result

    return denoise
