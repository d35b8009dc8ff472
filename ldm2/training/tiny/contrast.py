"""Contrastive training of CLAP: captions and sounds that say the same meet, all others part.

References: CLAP, arXiv:2211.06687; several positives per row: "Supervised Contrastive Learning", arXiv:2004.11362.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ldm2.training.loop import Clock, Recipe, train
from ldm2.training.tiny.data import Pool
from ldm2.training.tiny.text import vary

_CLIPS = 4000                              # heard by CLAP, at most


def feature_extractor() -> transformers.ClapFeatureExtractor:
    """CLAP's front end at a coarse hop: 16 mels of 10 s at 48 kHz in 251 frames."""
    return transformers.ClapFeatureExtractor(
        feature_size=16, sampling_rate=48_000, hop_length=1920, max_length_s=10, fft_window_size=2048, frequency_min=50,
        frequency_max=8000, truncation="rand_trunc", padding="repeatpad",
    )


@torch.no_grad()
def features(waveforms: Tensor, extractor: transformers.ClapFeatureExtractor) -> Tensor:
    """What the extractor makes of 16 kHz waveforms (B, N) of at most 10 s, many times faster: (B, 1, 251, 16)."""
    spectrum = torch.fft.rfft(waveforms)
    factor = extractor.sampling_rate // 16_000
    num_samples = waveforms.shape[1] * factor
    waveforms = torch.fft.irfft(F.pad(spectrum, (0, num_samples // 2 + 1 - spectrum.shape[1])), num_samples) * factor
    whole = extractor.nb_max_samples
    waveforms = waveforms.repeat(1, max(whole // num_samples, 1))
    waveforms = F.pad(waveforms, (0, whole - waveforms.shape[1]))
    n_fft = extractor.fft_window_size
    power = torch.stft(waveforms, n_fft, extractor.hop_length, window=torch.hann_window(n_fft), center=True,
                       pad_mode="reflect", return_complex=True).abs() ** 2
    filters = torch.from_numpy(np.asarray(extractor.mel_filters_slaney)).float()
    return 10 * (power.mT @ filters).clamp(min=1e-10).log10()[:, None]


def contrastive_loss(audio: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy over unit vectors audio and text (B, D) both ways; same (B, B) says which pairs belong together."""
    scores = scale * audio @ text.T
    share = same.float() / same.sum(dim=1, keepdim=True)
    return -0.5 * (share * (scores.log_softmax(1) + scores.T.log_softmax(1))).sum(dim=1).mean()


def train_clap(clap: transformers.ClapModel, tokenizer: transformers.RobertaTokenizer, pool: Pool, held_out: Pool,
               recipe: Recipe, clock: Clock, copies: Tensor | None = None) -> None:
    """Both branches together, from the waveforms of the first clips of the pool.

    copies: waveforms (K, N) of the first clips as the VAE and the vocoder return them. If given, the audio branch alone
    is trained, on the clips and on these: it ranks what the vocoder has made, and others rely on the text branch.
    """
    clap.logit_scale_t.requires_grad_(False)                                  # the ranking uses one scale at most
    for module in (clap.text_model, clap.text_projection):
        module.requires_grad_(copies is None)
    clap.audio_model.train()
    extractor = feature_extractor()
    classes = [a + b for a, b in zip(pool.labels, pool.levels)]
    number = {name: i for i, name in enumerate(dict.fromkeys(classes))}
    groups = torch.tensor([number[name] for name in classes])

    def heard(clips: Pool, count: int) -> Tensor:
        rows = torch.arange(min(count, len(clips)))
        return torch.cat([features(clips.waveform(part), extractor) for part in rows.split(32)])

    audio_pool, audio_held_out = heard(pool, _CLIPS), heard(held_out, 128)
    origin = torch.arange(len(audio_pool))
    if copies is not None:
        audio_pool = torch.cat([audio_pool, *(features(part, extractor) for part in copies.split(32))])
        origin = torch.cat([origin, torch.arange(len(copies))])

    device = clap.logit_scale_a.device

    def embed(audio: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        audio = clap.audio_model(audio.to(device)).pooler_output
        tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
        text = clap.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return F.normalize(clap.audio_projection(audio), dim=-1), F.normalize(clap.text_projection(text), dim=-1)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(audio_pool), (64,), generator=generator)
        audio = audio_pool[rows]
        rows = origin[rows]
        audio, text = embed(audio, vary([pool.captions[i] for i in rows], generator))
        same = groups[rows][:, None] == groups[rows][None]
        return contrastive_loss(audio, text, clap.logit_scale_a.exp().clamp(max=50), same.to(device))

    def evaluate() -> dict[str, float]:
        audio, text = embed(audio_held_out, held_out.captions[: len(audio_held_out)])
        best = (audio @ text.T).argmax(dim=1).tolist()
        right = [held_out.labels[i] == held_out.labels[j] for i, j in enumerate(best)]
        exact = [r and held_out.levels[i] == held_out.levels[j] for r, (i, j) in zip(right, enumerate(best))]
        return {"kind": sum(right) / len(best), "exact": sum(exact) / len(best)}

    train("clap" if copies is None else "clap_audio", clap, loss, recipe, clock, evaluate, evaluate_every=100)
