"""Sounds that differ, and what transformers' own ClapModel makes of them."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from ldm2 import audio

RATE = 16_000


def tone(number: int, seconds: float = 0.5) -> np.ndarray:
    """A sound (N,) unlike those of other numbers: a tone of its own pitch in noise of its own level."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(number).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * 110 * (1 + number) * time) + 0.01 * (1 + number % 4) * noise).astype(np.float32)


@torch.no_grad()
def by_transformers(place, sounds, prompts):
    """Audio (N, D) and text (P, D) embeddings of transformers' ClapModel, each sound by itself, at the sounds' RATE."""
    model = transformers.ClapModel.from_pretrained(place).eval()
    extractor = transformers.ClapFeatureExtractor.from_pretrained(place)
    tokenizer = transformers.RobertaTokenizer.from_pretrained(place)
    heard = [audio.resample(sound, RATE, extractor.sampling_rate) for sound in sounds]
    rows = []
    for sound in heard:
        words = tokenizer(prompts, padding=True, return_tensors="pt")
        output = model(**words, **extractor([sound], sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        rows.append(output.audio_embeds[0])
    return torch.stack(rows).double().numpy(), output.text_embeds.double().numpy()
