"""Training of a small HiFi-GAN from a start that already sings: Hann-windowed carriers in its last upsampler.

The last stage steps from frames to samples at once, hop 160 and kernel 320. Its kernels start as carriers at multiples
of the frame rate under a Hann window, so that constant inputs overlap-add to steady tones, and the layers before it,
which work at the frame rate, are first taught the strength of each carrier (no audio is made, so this is quick). A
carrier with a constant strength repeats every hop; noise therefore needs strengths of random sign. They come from the
mel itself: the irregular part of it, through fixed random weights, is as good as a die. Then the whole network is
tuned by spectra.

References: arXiv:2010.05646 (network); arXiv:1910.11480 (multi-resolution STFT loss).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm2.mel import MAGNITUDE_FLOOR, MEL_16KHZ, log_mel, mel_edges
from ldm2.training.loop import Clock, Recipe, train
from ldm2.training.tiny.data import Pool
from ldm2.training.tiny.sounds import halves
from ldm2.vocoder import Vocoder

NOISY = ("white noise", "rumble", "hiss", "wind", "rain")
_FLOOR = math.log(MAGNITUDE_FLOOR)
_RATE = 100                                # Hz, frames per second
_WINDOW = 320                              # samples: kernel of the last upsampler
_HOP = 160
_LINEAR = 0.1                              # share of a clip's greatest strength up to which the error counts linearly
_UNIT = 0.03                               # amplitude of a carrier of strength 1, so that strengths are of order one
_NOISE_GAIN = 1.33                         # overlap-adding strengths of random sign loses power, sum(hann^2) < 1


def carrier_bins(num_atoms: int) -> list[tuple[int, ...]]:
    """Multiples of 100 Hz in each atom: single ones first, the highest ones in pairs so that 79 of them fit."""
    doubled = 79 - num_atoms
    single = num_atoms - doubled
    return [(k,) for k in range(1, single + 1)] + [(k, k + 1) for k in range(single + 1, 79, 2)]


@torch.no_grad()
def start(vocoder: Vocoder) -> None:
    """Carriers in the last upsampler, which conv_post sums up, and an input layer that centres the mels."""
    last, post = vocoder.upsampler[-1], vocoder.conv_post
    atoms, _, window = last.weight.shape
    n = torch.arange(window) - (window - 1) / 2
    hann = torch.hann_window(window, periodic=True)
    phases = torch.rand(80, generator=torch.Generator().manual_seed(1)) * 2 * math.pi
    last.weight[:, :2] = 0.0
    last.weight[:, 2:] *= 0.1
    last.bias.zero_()
    for atom, bins in enumerate(carrier_bins(atoms)):
        wave = sum(torch.cos(2 * math.pi * k * _RATE / 16_000 * n + phases[k]) for k in bins)
        last.weight[atom, 0] = _UNIT * hann * wave / math.sqrt(len(bins))
    last.weight[:, 1] = -last.weight[:, 0]
    post.weight *= 0.01
    post.weight[0, :2] = 0.0
    post.weight[0, 0, 3], post.weight[0, 1, 3] = 1 / 1.01, -1 / 1.01          # leaky_relu(x) - leaky_relu(-x) = 1.01 x
    post.bias.zero_()
    for block in vocoder.resblocks[-len(vocoder.config.resblock_kernel_sizes):]:
        for conv in block.convs2:
            conv.weight[:2] = 0.0
            conv.bias[:2] = 0.0


def strengths(vocoder: Vocoder, mel: Tensor) -> Tensor:
    """Amplitudes of the carriers that enter the last upsampler for mel (B, 1, T, F): (B, atoms, T)."""
    x = vocoder.conv_pre(mel[:, 0].mT)
    for stage in range(len(vocoder.upsampler) - 1):
        x = vocoder.upsample(stage, x)
    return _UNIT * F.leaky_relu(x, vocoder.config.leaky_relu_slope)


class Teacher:
    """Strengths of the carriers in a waveform, with random signs where it is noise."""

    def __init__(self, num_atoms: int):
        self.bins = carrier_bins(num_atoms)
        generator = torch.Generator().manual_seed(2)
        centres = mel_edges(MEL_16KHZ)[1:-1].float()
        self.die = torch.zeros(num_atoms, 64, 9)
        for atom, bins in enumerate(self.bins):
            nearest = int((centres - _RATE * sum(bins) / len(bins)).abs().argmin())
            low, high = max(nearest - 2, 0), min(nearest + 3, 64)
            weights = torch.randn(high - low, 9, generator=generator)
            self.die[atom, low:high] = weights - weights.mean(dim=1, keepdim=True)
        self.window = torch.hann_window(_WINDOW, periodic=True)

    def __call__(self, waveform: Tensor, mel: Tensor, noisy: Tensor) -> Tensor:
        """waveform (B, N), mel (B, 1, T, F), noisy (B, T) -> (B, atoms, T)."""
        padded = F.pad(waveform, (80, 80))
        spectrum = torch.stft(padded, _WINDOW, _HOP, window=self.window, center=False, return_complex=True)
        amplitude = spectrum.abs()[:, ::2] * (2 / self.window.sum())          # (B, 81, T), bins of 100 Hz
        power = torch.stack([sum(amplitude[:, k] ** 2 for k in bins) for bins in self.bins], dim=1)
        smooth = F.avg_pool2d(power[:, None], (3, 7), stride=1, padding=(1, 3), count_include_pad=False)[:, 0]
        die = F.conv1d(mel[:, 0].mT.exp(), self.die, padding=4)
        rms = F.avg_pool1d(die**2, 31, 1, 15, count_include_pad=False).sqrt() + 1e-5
        noise = _NOISE_GAIN * smooth.sqrt() * (die / rms).clamp(-2, 2)
        return torch.where(noisy[:, None], noise, power.sqrt())


@torch.no_grad()
def solve_front(vocoder: Vocoder, pool: Pool, clips: int = 400) -> None:
    """Sets the layers before the last upsampler to the best they can do as a piecewise linear map, by least squares.

    conv_pre bends each mel bin at three levels (and some bins three frames away), the first upsampler adds these up to
    the strengths, with both signs, the second puts the signs together again; the residual blocks start as identities.
    """
    slope, atoms = vocoder.config.leaky_relu_slope, vocoder.upsampler[-1].weight.shape[0]
    pre, first, second = vocoder.conv_pre, *vocoder.upsampler[:2]
    pre.weight *= 0.02
    knots = [(b, 3, level) for level in (-4.0, -2.0, -0.3) for b in range(64)]
    knots += [(b, tap, -3.0) for tap in (0, 6) for b in range(0, 64, 2)]
    for channel, (b, tap, level) in enumerate(knots):
        pre.weight[channel] *= 0.0
        pre.weight[channel, b, tap] = 1.0
        pre.bias[channel] = -level
    teacher, features, wanted = Teacher(atoms), [], []
    for rows in torch.arange(min(clips, len(pool))).split(16):
        waveform, mel = pool.waveform(rows), pool.mel(rows)
        target = teacher(waveform, mel, noisy_frames([pool.labels[i] for i in rows], mel.shape[2])) / _UNIT
        bent = F.pad(F.leaky_relu(pre(mel[:, 0].mT), slope), (1, 1))
        moved = [bent[:, :, i : i + mel.shape[2]] for i in range(3)]
        taps = torch.cat([*moved, torch.ones_like(bent[:, :1, 2:])], dim=1)
        weight = 1 / target.abs().amax(dim=(1, 2), keepdim=True).clamp(min=0.3)
        features.append((weight * taps).mT[:, ::2].reshape(-1, taps.shape[1]))
        wanted.append((weight * target).mT[:, ::2].reshape(-1, atoms))
    x, y = torch.cat(features).double(), torch.cat(wanted).double()
    gram = x.T @ x
    solved = torch.linalg.solve(gram + 1e-5 * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y).float()
    width = len(knots)
    for tap in range(3):
        part = solved[tap * width : (tap + 1) * width]                        # (features, atoms)
        first.weight[:, :, 2 - tap] = torch.cat([part, -part], dim=1)         # a transposed kernel runs backwards
    first.bias.copy_(torch.cat([solved[-1], -solved[-1]]))
    second.weight *= 0.02
    eye = torch.eye(atoms) / (1 + slope)
    second.weight[:, :, 1] = torch.cat([eye, -eye])
    second.bias.zero_()
    for block in vocoder.resblocks[:-len(vocoder.config.resblock_kernel_sizes)]:
        for conv in block.convs2:
            conv.weight *= 0.1
            conv.bias.zero_()


def noisy_frames(labels: list[str], num_frames: int) -> Tensor:
    """Which frames of clips with these labels are noise: bool (len(labels), num_frames)."""
    rows = []
    for label in labels:
        first, second = halves(label) or (label, label)
        rows.append(torch.tensor([first in NOISY, second in NOISY]).repeat_interleave(num_frames // 2))
    return torch.stack(rows)


def train_front(vocoder: Vocoder, pool: Pool, held_out: Pool, recipe: Recipe, clock: Clock,
                decoded: Tensor | None = None) -> None:
    """Teaches the layers before the last upsampler the strengths. `decoded` are the VAE's versions of the first
    mels.
    """
    atoms = vocoder.upsampler[-1].weight.shape[0]
    teacher, device = Teacher(atoms), vocoder.conv_post.weight.device
    tail = [vocoder.upsampler[-1], vocoder.conv_post, vocoder.resblocks[-len(vocoder.config.resblock_kernel_sizes):]]
    for module in tail:
        module.requires_grad_(False)

    def error(waveform: Tensor, mel: Tensor, labels: list[str], given: Tensor) -> Tensor:
        wanted = teacher(waveform, mel, noisy_frames(labels, mel.shape[2]))
        small = _LINEAR * wanted.abs().amax(dim=(1, 2), keepdim=True).clamp(min=0.01)
        y, small = torch.asinh(wanted / small).to(device), small.to(device)
        difference = torch.asinh(strengths(vocoder, given.to(device)) / small) - y
        absolute = difference.abs().mean(dim=(1, 2)) / y.abs().mean(dim=(1, 2)).clamp(min=0.01)
        squared = (difference**2).mean(dim=(1, 2)) / (y**2).mean(dim=(1, 2)).clamp(min=0.01)
        return (0.5 * absolute + squared).mean()                             # silence for an answer: 1.5

    def loss(step: int, generator: torch.Generator) -> Tensor:
        use_decoded = decoded is not None and step % 2 == 0
        rows = torch.randint(len(decoded) if use_decoded else len(pool), (12,), generator=generator)
        gain = torch.exp(0.5 * torch.randn(len(rows), 1, generator=generator))
        waveform, mel = pool.waveform(rows) * gain, _louder(pool.mel(rows), gain)
        given = _louder(decoded[rows].float(), gain) if use_decoded else mel
        return error(waveform, given, [pool.labels[i] for i in rows], given)

    def evaluate() -> dict[str, float]:
        rows = torch.arange(min(64, len(held_out)))
        mel = held_out.mel(rows)
        return {"error": error(held_out.waveform(rows), mel, [held_out.labels[i] for i in rows], mel)}

    train("vocoder_front", vocoder, loss, recipe, clock, evaluate, evaluate_every=250)
    for module in tail:
        module.requires_grad_(True)


def _louder(mel: Tensor, gain: Tensor) -> Tensor:
    """The mel of the sound with this gain (B, 1); the floor stays where it is."""
    return torch.where(mel > _FLOOR + 0.01, mel + gain.log()[:, :, None, None], mel).clamp(min=_FLOOR)


class SpectralLoss:
    """Distance of two waveforms (B, N) by magnitudes only: log-mels, the grain of spectrograms, and levels by the hop.

    The grain of a block of the spectrogram is its mean power and how far its mean log power is below that: steady
    lines, a comb and noise of the same power differ in it, two draws of the same noise do not. Log-mels count down to
    the hum, grains down to 50 dB below a clip's strongest block; the few points with sound count as much as all the
    silent ones, or more: otherwise the best answer to a bell or a tone is silence.
    """

    def __init__(self):
        self.blocks = [(256, 64, 8, 10), (1024, 256, 8, 5), (4096, 1024, 16, 2)]   # n_fft, hop, bins, frames of a block

    def __call__(self, made: Tensor, wanted: Tensor) -> Tensor:
        mel, target = log_mel(made), log_mel(wanted)
        total = _balanced((mel - target).abs(), target > target.amax(dim=(1, 2, 3), keepdim=True) - 5, rest=1.0)
        for n_fft, hop, bins, frames in self.blocks:
            a, b = (_power(x, n_fft, hop) for x in (made, wanted))
            size = (bins, frames)
            mean = F.avg_pool2d(b, size)
            floor = 1e-5 * mean.amax(dim=(1, 2, 3), keepdim=True) + 1e-10
            level = ((F.avg_pool2d(a, size) + floor) / (mean + floor)).log().abs()
            depth = (F.avg_pool2d((a + floor).log(), size) - F.avg_pool2d((b + floor).log(), size)).abs()
            total = total + 0.5 * _balanced(level + depth, mean > 10 * floor)
        a, b = (F.avg_pool1d(x**2, _HOP) for x in (made, wanted))            # carriers must not beat within a hop
        floor = 1e-4 * b.amax(dim=1, keepdim=True) + 1e-10
        return total + 2 * ((a + floor) / (b + floor)).log().abs().mean()


def _balanced(error: Tensor, active: Tensor, rest: float = 1 / 3) -> Tensor:
    """Mean over what is active, and `rest` times the mean over the rest."""
    part = active.to(error)
    loud, silent = ((error * p).sum() / p.sum().clamp(min=1) for p in (part, 1 - part))
    return loud + rest * silent


def _power(waveform: Tensor, n_fft: int, hop: int) -> Tensor:
    """(B, N) -> (B, 1, bins, frames), 1 for a sine of amplitude 1."""
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(waveform, n_fft, hop, window=window, return_complex=True)
    return (spectrum.real**2 + spectrum.imag**2)[:, None] * (2 / window.sum()) ** 2


def train_spectra(vocoder: Vocoder, pool: Pool, held_out: Pool, recipe: Recipe, clock: Clock,
                  decoded: Tensor | None = None) -> None:
    """Tunes the whole vocoder on crops of 1.28 s, on true mels and on the VAE's versions of the first ones."""
    distance, device = SpectralLoss(), vocoder.conv_post.weight.device

    def crop(waveform: Tensor, mel: Tensor, at: list[int], frames: int = 128) -> tuple[Tensor, Tensor]:
        waves = torch.stack([w[a * _HOP : (a + frames) * _HOP] for w, a in zip(waveform, at)])
        return waves, torch.stack([m[:, a : a + frames] for m, a in zip(mel, at)])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        use_decoded = decoded is not None and step % 3 > 0
        rows = torch.randint(len(decoded) if use_decoded else len(pool), (6,), generator=generator)
        at = (torch.randint(17, (len(rows),), generator=generator) * 8).tolist()
        waveform, mel = crop(pool.waveform(rows), decoded[rows].float() if use_decoded else pool.mel(rows), at)
        return distance(vocoder(mel.to(device)), waveform.to(device))

    def evaluate() -> dict[str, float]:
        rows = torch.arange(min(24, len(held_out)))
        return {"distance": distance(vocoder(held_out.mel(rows).to(device)), held_out.waveform(rows).to(device))}

    train("vocoder", vocoder, loss, recipe, clock, evaluate, evaluate_every=100)
