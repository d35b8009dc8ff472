"""AudioLDM2: the stages strung together. Text to sound here; the edits of a sound are in `ldm2.edit`.

Reference: "AudioLDM 2: Learning Holistic Audio Generation with Self-supervised Pretraining", arXiv:2308.05734.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm2.call import Call, takes_settings
from ldm2.conditioning import Conditioning
from ldm2.edit import edits, reconstruction
from ldm2.noise import SeededNoise
from ldm2.result import Result, collect
from ldm2.runtime.progress import shown
from ldm2.settings import GENERATE, Settings
from ldm2.stages import NonFiniteError, Stages

__all__ = ["AudioLDM2", "NonFiniteError"]

Encode = Callable[[Settings], tuple[Conditioning, Conditioning | None]]


class AudioLDM2(Stages):
    """Text to sound, and sound to sound. Built by `ldm2.load`; its stages can be used one by one: see `Stages`."""

    reconstruct = reconstruction.reconstruct
    transfer = edits.transfer
    variations = edits.variations
    inpaint = edits.inpaint
    extend = edits.extend
    super_resolution = edits.super_resolution

    @takes_settings(GENERATE, Call)
    def generate(self, *args: Any, **options: Any) -> Result:
        """Sound for one prompt or several; a list of prompts makes a batch whose rows do not influence each other.

        latents:     standard normal (rows, C, T/f, F/f) to start from in place of the seeds' own
        callback:    called as callback(step, total, latents) after each step; returning False stops with ldm2.Cancelled
        progress:    True shows a progress bar on stderr; a function is called as progress(stage, done, total)

        Raises ValueError for arguments out of range and NonFiniteError if a stage overflows its dtype.
        """
        return self.run(Call.of(GENERATE, self.origin, *args, **options), self.conditionings)

    def run(self, call: Call, encode: Encode) -> Result:
        """What `generate` does with a call. encode: makes both sides of guidance for settings, as `conditionings` does.

        Raises what `generate` raises.
        """
        call = call.resolved(self.defaults)
        call = replace(call, lora=self.adapters.pinned(call.lora))
        if call.loop:
            call = replace(call, seconds=self._whole_frames(call.seconds))
        noise = SeededNoise(call.seeds)
        shape = self.latent_shape(call.seconds)
        latents = noise.draw(*shape) if call.latents is None else _checked(call.latents, (len(call.seeds), *shape))
        changes = [start for start, _ in call.prompt_at]
        windows = self.windows(shape[1], call.window, call.overlap, loop=call.loop, changes=changes)
        self.warn_unranked(call)
        with shown(call.progress) as report:
            report("reading the prompt", 0, 1)
            with self.adapters.hold(call.lora):
                conditioning, unconditional = encode(call)
                latents = self.denoise(conditioning, unconditional, latents, call, noise=noise, windows=windows,
                                       callback=call.callback, progress=report)
            mel = self.decode(latents, loop=call.loop, progress=report)
            waveforms = self.vocode(mel, loop=call.loop, progress=report)
            waveforms = waveforms[:, : round(call.seconds * self.sample_rate)].numpy()
            return collect(self, call, waveforms, latents, mel, report)

    def _whole_frames(self, seconds: float) -> float:
        """The length of the whole number of latent frames, one at least, that is nearest to `seconds`."""
        frame = self.samples_per_latent_frame
        return max(1, round(seconds * self.sample_rate / frame)) * frame / self.sample_rate


def _checked(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of the right shape. Raises ValueError."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents must be a tensor of shape {shape} for these settings, got {found}")
    return latents
