"""FLOP of a generation from the sizes alone: the modules run on the meta device, where nothing is computed."""

from __future__ import annotations

import torch

from ldm2.conditioning import Conditioning
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.profiling import flop_of
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

TOKENS = (8, 12)                                           # of the contexts: GPT-2's vectors, words


class Flop:
    """What the stages of a pipeline cost, a multiply-add counted as two, work that both branches share once."""

    def __init__(self, pipe: AudioLDM2):
        self.pipe = pipe
        with torch.device("meta"):
            self.unet, self.vae, self.vocoder = (
                kind(part.config) for kind, part in ((UNet, pipe.unet), (VAE, pipe.vae), (Vocoder, pipe.vocoder))
            )

    def step(self, seconds: float, rows: int = 1) -> int:
        """One step of the UNet with guidance, for `rows` sounds."""
        widths = self.unet.config.context_widths
        with torch.device("meta"), torch.no_grad():
            contexts = tuple(torch.empty(2 * rows, tokens, width) for tokens, width in zip(TOKENS, widths))
            prepared = self.unet.prepare(Conditioning(contexts, (None,) * len(contexts)))
            time = self.unet.embed_time(1.0)
            x = torch.empty(rows, *self.pipe.latent_shape(seconds))
            return flop_of(lambda: self.unet(x, 1.0, prepared, time=time))

    def decode(self, seconds: float, rows: int = 1) -> int:
        """Latents -> log-mel, whole."""
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(rows, *self.pipe.latent_shape(seconds))
            return flop_of(lambda: self.vae.decode(x))

    def vocode(self, seconds: float, rows: int = 1) -> int:
        """Log-mel -> waveform, whole."""
        _, frames, bins = self.pipe.latent_shape(seconds)
        factor = self.pipe.vae.config.downsampling
        with torch.device("meta"), torch.no_grad():
            mel = torch.empty(rows, 1, factor * frames, factor * bins)
            return flop_of(lambda: self.vocoder(mel))

    def generation(self, seconds: float, steps: int, rows: int = 1) -> int:
        """All of it but the text, which is less than a hundredth."""
        return steps * self.step(seconds, rows) + self.decode(seconds, rows) + self.vocode(seconds, rows)
