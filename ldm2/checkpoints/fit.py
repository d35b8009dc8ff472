"""Whether the parts of a checkpoint belong together: each may be whole, and yet of another model."""

from __future__ import annotations

from ldm2.text.encoder import TextEncoder
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder


def check_fit(unet: UNet, vae: VAE, vocoder: Vocoder, text: TextEncoder) -> None:
    """Raise ValueError, naming both sides, where one part gives what the next cannot take."""
    latents = vae.config.latent_channels
    clap = None if text.clap is None else text.clap.text_projection.linear2.out_features
    states = _states(text)
    pairs = [
        ("the UNet's in_channels", unet.config.in_channels, "the VAE's latent_channels", latents),
        ("the UNet's out_channels", unet.config.out_channels, "the VAE's latent_channels", latents),
        ("the widths of the UNet's contexts", list(unet.config.context_widths), "those of the text encoders",
         _contexts(text)),
        ("the remainder of the vocoder's mel bins by the VAE's factor",
         vocoder.config.num_mels % vae.config.downsampling, "that of whole latents", 0),
    ]
    if unet.config.film_dim is not None:
        pairs.append(("the width of the UNet's FiLM condition", unet.config.film_dim, "that of CLAP", clap))
    if text.gpt2 is not None:
        sizes = text.projection.config
        pairs += [
            ("the projection's text_encoder_dim", sizes.clap_dim, "the width of CLAP", clap),
            ("the projection's text_encoder_1_dim", sizes.text_dim, "the width of the second text encoder", states),
            ("the projection's langauge_model_dim", sizes.width, "the width of GPT-2", text.gpt2.config.n_embd),
        ]
    for one, found, other, expected in pairs:
        if found != expected:
            raise ValueError(f"its parts are of different models: {one} is {found}, {other} {expected}")


def _contexts(text: TextEncoder) -> list[int]:
    """Width of each context that the text encoders make."""
    generated = [] if text.gpt2 is None else [text.gpt2.config.n_embd]
    return generated if text.t5 is None else [*generated, text.t5.model.config.d_model]


def _states(text: TextEncoder) -> int | None:
    """Width of the states of T5 or of the phonemes, None without either."""
    if text.t5 is not None:
        return text.t5.model.config.d_model
    return None if text.phonemes is None else text.phonemes.text_encoder.config.hidden_size
