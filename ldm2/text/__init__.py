"""From prompts to conditioning: tokenizers, CLAP, T5, GPT-2, phonemes, and CLAP as a judge of candidates."""

from ldm2.text.encoder import TextEncoder

__all__ = ["TextEncoder"]
