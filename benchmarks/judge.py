"""A judge that hears whether a sound is what was asked for, by properties of the signal only.

Pitch and how it moves, purity, flatness, onsets, decay, level: see RULES for what each kind must have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm2.training.tiny.sounds import SAMPLE_RATE, halves

_FFT = 1024
_HOP = 160
_HERTZ = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)


@dataclass(frozen=True)
class Measured:
    """What the judge knows of a clip. Frames are 10 ms apart."""

    seconds: float
    rms: float
    envelope: np.ndarray                   # (frames,) rms of 20 ms
    active: np.ndarray                     # (frames,) envelope above a tenth of its loud part
    pitch: np.ndarray                      # (frames,) Hz, the strongest partial
    purity: np.ndarray                     # (frames,) share of the energy within 60 Hz or 5 % of it
    onsets: np.ndarray                     # seconds at which the envelope jumps up
    centroid: float                        # Hz, of the power spectrum
    low_share: float                       # of the power below 300 Hz
    high_share: float                      # of the power above 3000 Hz
    flatness: float                        # of the mean power spectrum from 100 to 6000 Hz, 1 = white

    @property
    def steady_pitch(self) -> np.ndarray:
        """Pitch where there is sound."""
        return self.pitch[self.active]

    @property
    def onset_rate(self) -> float:
        """Onsets per second, from the median distance of neighbours."""
        return 0.0 if len(self.onsets) < 2 else 1 / float(np.median(np.diff(self.onsets)))

    @property
    def is_tonal(self) -> bool:
        return bool(np.median(self.purity[self.active]) > 0.6)


def measure(waveform: np.ndarray) -> Measured:
    """Properties of a 16 kHz waveform (N,)."""
    wave = np.asarray(waveform, dtype=np.float64)
    frames = len(wave) // _HOP
    padded = np.pad(wave, _FFT // 2)
    window = np.hanning(_FFT)
    places = np.arange(frames) * _HOP + _HOP // 2
    power = np.abs(np.fft.rfft(padded[places[:, None] + np.arange(_FFT)] * window, axis=1)) ** 2   # (frames, bins)
    short = np.pad(wave**2, 160)
    envelope = np.sqrt(np.array([short[p : p + 320].mean() for p in places]) + 1e-14)
    loud = np.quantile(envelope, 0.98)
    total = power.sum(axis=1) + 1e-12
    peak = power[:, 2:].argmax(axis=1) + 2
    pitch = _interpolate(power, peak)
    near = np.abs(_HERTZ - pitch[:, None]) <= np.maximum(60, 0.05 * pitch)[:, None]
    mean_power = power.mean(axis=0) + 1e-14
    band = (_HERTZ > 100) & (_HERTZ < 6000)
    smooth = np.convolve(mean_power, np.ones(5) / 5, mode="same")[band]
    return Measured(
        seconds=len(wave) / SAMPLE_RATE,
        rms=float(np.sqrt(np.mean(wave**2))),
        envelope=envelope,
        active=envelope > 0.1 * loud,
        pitch=pitch,
        purity=(power * near).sum(axis=1) / total,
        onsets=_onsets(envelope, loud),
        centroid=float((mean_power * _HERTZ).sum() / mean_power.sum()),
        low_share=float(mean_power[_HERTZ < 300].sum() / mean_power.sum()),
        high_share=float(mean_power[_HERTZ > 3000].sum() / mean_power.sum()),
        flatness=float(np.exp(np.log(smooth).mean()) / smooth.mean()),
    )


def _interpolate(power: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Frequency of the peaks, by a parabola through three values in dB."""
    rows = np.arange(len(peak))
    last = power.shape[1] - 1
    a, b, c = (np.log(power[rows, np.clip(peak + d, 0, last)] + 1e-14) for d in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.where(np.abs(bend) > 1e-9, 0.5 * (a - c) / np.where(np.abs(bend) > 1e-9, bend, 1), 0)
    return (peak + np.clip(shift, -0.5, 0.5)) * (SAMPLE_RATE / _FFT)


def _onsets(envelope: np.ndarray, loud: float) -> np.ndarray:
    """Times at which the envelope rises by 8 dB within 30 ms to more than a quarter of its loud part; 60 ms apart."""
    level = 20 * np.log10(np.maximum(envelope, 1e-3 * loud))
    before = np.concatenate([np.full(3, level.min()), level[:-3]])
    starts: list[int] = []
    for i in np.flatnonzero((level - before > 8) & (envelope > 0.25 * loud)):
        if not starts or i - starts[-1] > 6:
            starts.append(int(i))
    return np.array(starts) * 0.01


def slope(m: Measured) -> tuple[float, float]:
    """Correlation of log pitch with time, and the octaves gone, over the frames with sound."""
    at = np.flatnonzero(m.active)
    octaves = np.log2(m.pitch[at])
    if len(at) < 20 or octaves.std() < 1e-6:
        return 0.0, 0.0
    fit = np.polyfit(at, octaves, 1)
    return float(np.corrcoef(at, octaves)[0, 1]), float(fit[0] * (at[-1] - at[0]))


def _is_tone(m: Measured, low: float, high: float) -> bool:
    pitch = m.steady_pitch
    middle = float(np.median(pitch))
    close = np.abs(pitch - middle) < max(60, 0.06 * middle)
    return m.active.mean() > 0.8 and m.is_tonal and close.mean() > 0.85 and low <= middle <= high


def _is_noise(m: Measured) -> bool:
    """Steady and without pitch."""
    inner = m.envelope[5:-5]
    steady = np.std(20 * np.log10(inner + 1e-9)) < 3.5
    return bool(m.active.mean() > 0.9 and steady and np.median(m.purity) < 0.5)


def _is_siren(m: Measured) -> bool:
    octaves = np.log2(m.pitch)
    smooth = np.convolve(octaves, np.ones(9) / 9, mode="valid")
    reach = np.quantile(smooth, 0.95) - np.quantile(smooth, 0.05)
    middle = 0.5 * (np.quantile(smooth, 0.95) + np.quantile(smooth, 0.05))
    side, crossings = 0, 0
    for value in smooth:
        now = 1 if value > middle + 0.2 * reach else -1 if value < middle - 0.2 * reach else side
        crossings += side != 0 and now != side
        side = now
    tonal = (m.purity > 0.4).mean() > 0.8 and m.active.mean() > 0.8 and np.median(m.pitch) > 350 and _gusts(m) < 8
    return bool(tonal and 0.5 < reach < 2.2 and 3 <= crossings <= 8)


def _repeats(m: Measured, low: float, high: float) -> bool:
    """Onsets at that rate, mostly at equal distances."""
    gaps = np.diff(m.onsets)
    if len(gaps) < 2:
        return False
    even = np.abs(gaps - np.median(gaps)) < 0.3 * np.median(gaps)
    return bool(low <= m.onset_rate <= high and even.mean() > 0.6)


def _is_click(m: Measured) -> bool:
    return m.active.mean() < 0.55 and m.centroid > 1200 and not m.is_tonal


def _is_drum(m: Measured) -> bool:
    return m.low_share > 0.7 and m.centroid < 500 and m.active.mean() < 0.85


def _is_bell(m: Measured, low: float, high: float) -> bool:
    loudest = int(m.envelope.argmax())
    if loudest > 0.3 * len(m.envelope) or not 1 <= len(m.onsets) <= 2:
        return False
    level = 20 * np.log10(m.envelope[loudest:] / m.envelope[loudest] + 1e-9)
    falls = -45 < level[100] < -5 and level[60] < -2.5
    rings = level[20] > -9
    pitch = np.median(m.pitch[loudest + 5 : loudest + 60])
    return bool(falls and rings and low <= pitch <= high and np.median(m.purity[loudest + 5 : loudest + 60]) > 0.4)


def _is_plucked(m: Measured) -> bool:
    if not 3 <= len(m.onsets) <= 7 or (m.low_share > 0.9 and m.centroid < 200):
        return False
    starts = [int(t * 100) + 3 for t in m.onsets]
    notes = np.array([np.median(m.pitch[s : s + 12]) for s in starts if s + 12 < len(m.pitch)])
    pure = np.array([np.median(m.purity[s : s + 12]) for s in starts if s + 12 < len(m.pitch)])
    if len(notes) < 2:
        return False
    changes = np.abs(np.diff(notes)) > 60
    return bool(_repeats(m, 1.2, 3.0) and pure.mean() > 0.45 and changes.mean() > 0.3 and notes.max() < 1900)


def _is_beeping(m: Measured) -> bool:
    pitch = m.steady_pitch
    middle = np.median(pitch)
    close = (np.abs(pitch - middle) < max(60, 0.06 * middle)).mean() > 0.75
    on = 0.3 < m.active.mean() < 0.85
    return bool(on and _repeats(m, 2.3, 5.0) and m.is_tonal and close and 700 <= middle <= 2000)


def _gusts(m: Measured) -> float:
    """Range in dB of the level over 0.2 s, without the ends."""
    smooth = np.convolve(m.envelope**2, np.ones(20) / 20, mode="valid")[5:-5]
    return float(10 * np.log10(np.quantile(smooth, 0.95) / np.quantile(smooth, 0.05)))


def _is_wind(m: Measured) -> bool:
    return bool(150 < m.centroid < 1300 and m.low_share < 0.9 and np.median(m.purity[m.active]) < 0.75 and _gusts(m) > 6
                and len(m.onsets) <= 3 and np.std(np.log2(m.steady_pitch)) > 0.1)


def _is_rain(m: Measured) -> bool:
    inner = m.envelope[5:-5]
    rough = np.std(20 * np.log10(inner + 1e-9))
    return bool(m.centroid > 2000 and not m.is_tonal and 3.0 < rough < 14 and _gusts(m) < 14 and m.active.mean() > 0.4
                and len(m.onsets) >= 8)


RULES: dict[str, Callable[[Measured], bool]] = {
    "low tone": lambda m: _is_tone(m, 140, 560),
    "middle tone": lambda m: _is_tone(m, 640, 1400),
    "high tone": lambda m: _is_tone(m, 1700, 3600),
    "rising sweep": lambda m: slope(m)[0] > 0.9 and slope(m)[1] > 1 and m.active.mean() > 0.8 and not _is_siren(m),
    "falling sweep": lambda m: slope(m)[0] < -0.9 and slope(m)[1] < -1 and m.active.mean() > 0.8 and not _is_siren(m),
    "siren": _is_siren,
    "white noise": lambda m: _is_noise(m) and m.flatness > 0.4 and 2500 < m.centroid < 5200,
    "rumble": lambda m: m.low_share > 0.85 and m.centroid < 190 and m.active.mean() > 0.8 and _gusts(m) < 8
    and np.std(20 * np.log10(m.envelope[5:-5] + 1e-9)) > 0.8,
    "hiss": lambda m: _is_noise(m) and m.high_share > 0.85,
    "slow clicks": lambda m: _is_click(m) and _repeats(m, 1.2, 3.3),
    "fast clicks": lambda m: _is_click(m) and _repeats(m, 5.5, 13),
    "slow drum": lambda m: _is_drum(m) and _repeats(m, 1.2, 2.6),
    "fast drum": lambda m: _is_drum(m) and _repeats(m, 3.5, 7),
    "low bell": lambda m: _is_bell(m, 250, 950),
    "high bell": lambda m: _is_bell(m, 1200, 2800),
    "plucked notes": _is_plucked,
    "alarm beeps": _is_beeping,
    "wind": _is_wind,
    "rain": _is_rain,
}


def is_right(waveform: np.ndarray, label: str) -> bool:
    """Whether the judge hears in a 16 kHz waveform (N,) what the label says. Raises ValueError for an unknown label."""
    pair = halves(label)
    if pair is not None:
        wave, middle, edge = np.asarray(waveform), len(waveform) // 2, int(0.08 * SAMPLE_RATE)
        parts = (wave[: middle - edge], wave[middle + edge :])
        return all(is_right(part, kind) for part, kind in zip(parts, pair))
    if label not in RULES:
        raise ValueError(f"label must be one of {', '.join(RULES)}, got {label!r}")
    m = measure(waveform)
    return m.rms > 1e-4 and bool(RULES[label](m))
