"""Sounds made by formulas, with captions: what the bundled tiny model is trained on and judged by.

A sound is one of KINDS at one of three levels. All frequencies of steady tones are multiples of 100 Hz, the frame rate
of the mel: a vocoder that is given a constant mel can only answer with something that repeats every hop. For the same
reason the floor under every sound, which recordings have and formulas have not, is a faint hum of such tones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SAMPLE_RATE = 16_000                       # Hz
NUM_SAMPLES = 40_960                       # 2.56 s, 256 mel frames

LEVELS = {"loud": 0.75, "": 0.25, "quiet": 0.06}                             # peak amplitude of a tone
LEVEL_WORDS = {"loud": ("loud", "very loud", "strong"), "": ("",), "quiet": ("quiet", "soft", "faint")}
LEVEL_SHARE = {"loud": 0.2, "": 0.6, "quiet": 0.2}                           # of the sounds drawn

HUM = 1.5e-4                               # amplitude of each of the hum's 79 tones: -60 dB of full scale in all

Wave = np.ndarray                          # (N,) float64
Maker = Callable[[np.random.Generator, int], Wave]


@dataclass(frozen=True)
class Sound:
    """One clip: float32 samples (N,) in [-1, 1] at SAMPLE_RATE, what it is, and one way to say so."""

    waveform: np.ndarray
    kind: str
    level: str
    caption: str


# ---- building blocks


def _seconds(num_samples: int) -> Wave:
    return np.arange(num_samples) / SAMPLE_RATE


def _fade(wave: Wave, seconds: float = 0.02) -> Wave:
    """Raised-cosine fade at both ends, in place."""
    n = int(seconds * SAMPLE_RATE)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n)
    wave[:n] *= ramp
    wave[-n:] *= ramp[::-1]
    return wave


def _glide(rng: np.random.Generator, hertz: Wave) -> Wave:
    """Sine whose frequency is given for each sample."""
    return np.sin(2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE + rng.uniform(0, 2 * np.pi))


def _noise(rng: np.random.Generator, num_samples: int, low: float, high: float, slope: float = 100.0) -> Wave:
    """Gaussian noise between two frequencies in Hz with soft edges `slope` Hz wide, rms 1."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    hertz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    spectrum *= np.clip((hertz - low) / slope + 0.5, 0, 1) * np.clip((high - hertz) / slope + 0.5, 0, 1)
    wave = np.fft.irfft(spectrum, num_samples)
    return wave / np.sqrt(np.mean(wave**2))


def _repeat(rng: np.random.Generator, num_samples: int, period: float, stroke: Callable[[], Wave]) -> Wave:
    """The stroke every `period` seconds, the first one soon after the start."""
    wave = np.zeros(num_samples)
    start = rng.uniform(0.02, 0.02 + 0.5 * period)
    while (at := int(start * SAMPLE_RATE)) < num_samples - 800:
        hit = stroke()[: num_samples - at]
        wave[at : at + len(hit)] += hit
        start += period
    return wave


def _hum(rng: np.random.Generator, num_samples: int) -> Wave:
    """All multiples of 100 Hz at fixed phases, begun anywhere."""
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, 79)
    hertz = 100 * np.arange(1, 80)
    period = HUM * np.sin(2 * np.pi * _seconds(160)[:, None] * hertz + phases).sum(axis=1)
    return np.resize(np.roll(period, rng.integers(160)), num_samples)


# ---- the kinds


def _tone(frequencies: tuple[int, ...]) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        return _fade(_glide(rng, np.full(n, float(rng.choice(frequencies)))))
    return make


def _sweep(up: bool) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        low, high = rng.uniform(200, 400), rng.uniform(1800, 3000)
        hertz = low * (high / low) ** np.linspace(0, 1, n)
        return _fade(_glide(rng, hertz if up else hertz[::-1]))
    return make


def _siren(rng: np.random.Generator, n: int) -> Wave:
    middle, rate, phase = rng.uniform(850, 1050), rng.uniform(0.8, 1.2), rng.uniform(0, 2 * np.pi)
    return _fade(_glide(rng, middle * 1.6 ** np.sin(2 * np.pi * rate * _seconds(n) + phase)))


def _band(low: float, high: float, slope: float = 100.0) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        return _fade(0.5 * _noise(rng, n, low, high, slope))
    return make


def _clicks(period: tuple[float, float]) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        def stroke() -> Wave:
            return 1.2 * rng.standard_normal(80) * np.exp(-np.arange(80) / 20)
        return _repeat(rng, n, rng.uniform(*period), stroke)
    return make


def _drums(period: tuple[float, float]) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        def stroke() -> Wave:
            t = _seconds(3200)
            return 1.3 * np.sin(2 * np.pi * (70 * t + 3.0 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.05)
        return _repeat(rng, n, rng.uniform(*period), stroke)
    return make


def _bell(frequencies: tuple[int, ...]) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Wave:
        f, t = float(rng.choice(frequencies)), _seconds(n)
        wave = np.zeros(n)
        for ratio, gain, decay in ((1.0, 0.75, 0.6), (2.0, 0.3, 0.35), (2.75, 0.25, 0.2)):
            hertz = 100 * round(ratio * f / 100)
            wave += gain * np.sin(2 * np.pi * hertz * t + rng.uniform(0, 2 * np.pi)) * np.exp(-t / decay)
        delay = int(rng.uniform(0.05, 0.2) * SAMPLE_RATE)
        wave = np.concatenate([np.zeros(delay), wave])[:n]
        return wave
    return make


def _pluck(rng: np.random.Generator, n: int) -> Wave:
    t = _seconds(9600)
    notes = [int(f) for f in rng.choice([300, 400, 500, 600, 700, 800], size=8, replace=True)]
    notes = [f if f != before else (f + 200 if f < 700 else f - 300) for before, f in zip([0, *notes], notes)]

    def stroke() -> Wave:
        f = notes.pop()
        tone = sum(np.sin(2 * np.pi * f * k * t) / k**1.5 for k in (1, 2, 3))
        return 0.8 * tone * np.exp(-t / 0.1) * np.minimum(1, t / 0.002)
    return _repeat(rng, n, rng.uniform(0.5, 0.64), stroke)


def _beeps(rng: np.random.Generator, n: int) -> Wave:
    f, period = float(rng.choice([1000, 1200, 1400])), rng.uniform(0.28, 0.36)

    def stroke() -> Wave:
        return _fade(_glide(rng, np.full(int(0.5 * period * SAMPLE_RATE), f)), 0.008)
    return _repeat(rng, n, period, stroke)


def _wind(rng: np.random.Generator, n: int) -> Wave:
    t = _seconds(n)
    gust = np.sin(2 * np.pi * rng.uniform(0.45, 0.7) * t + rng.uniform(0, 2 * np.pi))
    soft, hard = _noise(rng, n, 200, 500), _noise(rng, n, 400, 1100)
    return _fade(0.45 * (soft * 10 ** (0.4 * gust - 0.4) + 0.8 * hard * 10 ** (0.8 * gust - 0.8)), 0.05)


def _rain(rng: np.random.Generator, n: int) -> Wave:
    wave = np.zeros(n + 400)
    shape = np.exp(-np.arange(160) / 40)
    for at in rng.integers(0, n, size=int(35 * n / SAMPLE_RATE)):
        wave[at : at + 160] += rng.uniform(0.4, 1.2) * rng.standard_normal(160) * shape
    spectrum = np.fft.rfft(wave[:n])
    spectrum *= np.clip((np.fft.rfftfreq(n, 1 / SAMPLE_RATE) - 1500) / 1000, 0, 1)
    return np.fft.irfft(spectrum, n) + 0.03 * _noise(rng, n, 1500, 8000)


@dataclass(frozen=True)
class Kind:
    """How a kind is made and said. In a phrase, `{}` is where a word of loudness goes, with the space before it."""

    make: Maker
    phrases: tuple[str, ...]


def _tone_phrases(words: tuple[str, ...]) -> tuple[str, ...]:
    frames = ("a{} {} tone", "a{} steady {} tone", "a{} {} pitched tone", "a{} tone with a {} pitch",
              "a{} {} steady tone", "a{} {} sine tone", "a{} {} constant tone", "a{} continuous {} tone",
              "a{} {} note held")
    return tuple(frame.format("{}", word) for frame in frames for word in words)


def _fill(words: tuple[str, ...], *frames: str) -> tuple[str, ...]:
    """Each frame with `[]` replaced by each word."""
    return tuple(frame.replace("[]", word) for frame in frames for word in words)


KINDS: dict[str, Kind] = {
    "low tone": Kind(_tone((200, 300, 400)), _tone_phrases(("low", "deep", "low")) + ("a{} low hum",)),
    "middle tone": Kind(_tone((800, 900, 1000)), _tone_phrases(("middle", "medium", "mid"))),
    "high tone": Kind(_tone((2000, 2200, 2400, 2600, 2800)), _tone_phrases(("high", "high", "shrill"))),
    "rising sweep": Kind(_sweep(True), (
        "a{} rising sweep", "a{} rising tone", "a{} sweep going up", "a{} tone rising in pitch", "a{} upward sweep",
        "a{} pitch that rises", "a{} ascending tone", "a{} tone that goes up", "a{} glide from low to high",
        "a{} tone sweeping upwards", "a{} sound rising from low to high")),
    "falling sweep": Kind(_sweep(False), (
        "a{} falling sweep", "a{} falling tone", "a{} sweep going down", "a{} tone falling in pitch",
        "a{} downward sweep",
        "a{} pitch that falls", "a{} descending tone", "a{} tone that goes down", "a{} glide from high to low",
        "a{} tone sweeping downwards", "a{} sound falling from high to low")),
    "siren": Kind(_siren, (
        "a{} siren", "a{} wailing siren", "a{} police siren", "a{} siren going up and down", "a{} siren wailing",
        "a{} ambulance siren", "the sound of a{} siren", "a{} tone going up and down")),
    "white noise": Kind(_band(0, 8200), (
        "{} white noise", "{} static", "a{} burst of white noise", "{} steady white noise", "{} constant white noise",
        "the sound of{} white noise", "a{} noise", "{} radio static", "{} flat noise")),
    "rumble": Kind(_band(40, 170, 40.0), (
        "a{} deep rumble", "a{} low rumble", "{} deep rumbling", "{} rumbling", "a{} rumble", "the sound of{} rumbling",
        "a{} rumbling noise", "a{} deep rumbling noise", "{} distant thunder rumbling")),
    "hiss": Kind(_band(4200, 8200), (
        "a{} bright hiss", "a{} hiss", "{} hissing", "a{} hissing sound", "a{} bright hissing noise",
        "{} steam hissing",
        "the sound of{} hissing", "a{} high hiss", "{} bright hissing")),
    "slow clicks": Kind(_clicks((0.45, 0.6)), _fill(("clicks", "ticks", "clicking", "ticking"),
        "{} slow []", "{} [], slow", "{} [] at a slow pace", "{} slowly repeated []", "slow{} []") + (
        "{} slow ticking of a clock", "a{} slow click", "a{} clock ticking slowly", "{} clicking slowly")),
    "fast clicks": Kind(_clicks((0.1, 0.13)), _fill(("clicks", "ticks", "clicking", "ticking"),
        "{} fast []", "{} [], fast", "{} [] at a fast pace", "{} quickly repeated []", "{} rapid []", "{} quick []",
        "fast{} []") + ("a{} clock ticking fast", "{} clicking quickly")),
    "slow drum": Kind(_drums((0.5, 0.64)), _fill(("drum", "bass drum", "kick drum"),
        "a{} slow [] beat", "{} slow [] beats", "a{} [] beating slowly", "a{} slow []", "{} [] hits, slow",
        "a{} [] played slowly",
        "{} slow []s") + ("{} slow drumming",)),
    "fast drum": Kind(_drums((0.2, 0.24)), _fill(("drum", "bass drum", "kick drum"),
        "a{} fast [] beat", "{} fast [] beats", "a{} [] beating fast", "a{} fast []", "{} [] hits, fast",
        "a{} [] played fast",
        "{} rapid [] beats", "a{} quick [] beat", "{} fast []s") + ("{} fast drumming",)),
    "low bell": Kind(_bell((400, 500, 600)), _fill(("low", "deep", "big low"),
        "a{} [] bell", "a{} [] bell strike", "a{} [] bell ringing", "a{} [] pitched bell", "the strike of a{} [] bell",
        "a{} [] bell rings once", "a{} [] bell struck once")),
    "high bell": Kind(_bell((1600, 1800, 2000)), _fill(("high", "bright", "small high"),
        "a{} [] bell", "a{} [] bell strike", "a{} [] bell ringing", "a{} [] pitched bell", "the strike of a{} [] bell",
        "a{} [] bell rings once", "a{} [] bell struck once")),
    "plucked notes": Kind(_pluck, (
        "{} plucked notes", "a{} plucked string", "{} plucked strings", "{} notes plucked on a string",
        "a{} plucked guitar",
        "{} plucking notes", "a{} melody of plucked notes", "{} guitar notes", "a{} string being plucked")),
    "alarm beeps": Kind(_beeps, (
        "{} alarm beeps", "an{} alarm", "{} beeps", "{} beeping", "an{} alarm beeping", "a{} beeping alarm",
        "{} repeated beeps", "the{} beeping of an alarm", "{} electronic beeps", "an{} alarm clock beeping")),
    "wind": Kind(_wind, (
        "{} wind", "{} wind blowing", "{} gusts of wind", "the{} sound of wind", "a{} wind howling", "{} blowing wind",
        "a{} gusty wind", "{} howling wind")),
    "rain": Kind(_rain, (
        "{} rain", "{} rain falling", "{} falling rain", "the{} sound of rain", "{} raindrops", "{} rain drops falling",
        "{} rain on a roof", "{} pattering rain")),
}

_HALVES = ("low tone", "high tone", "white noise")
_HALF_WORDS = {"low tone": ("a low tone", "a deep tone"), "high tone": ("a high tone", "a high pitched tone"),
               "white noise": ("white noise", "static", "noise")}
_JOINTS = ("{}, then {}", "{} then {}", "{} followed by {}", "first {}, then {}", "{} and then {}")
PAIRS: tuple[tuple[str, str], ...] = tuple((a, b) for a in _HALVES for b in _HALVES if a != b)

LABELS: tuple[str, ...] = (*KINDS, *(f"{a}, then {b}" for a, b in PAIRS))
_PAIR_WEIGHT = 0.6                         # a pair is drawn this often as a kind


def halves(label: str) -> tuple[str, str] | None:
    """The two kinds of a label "X, then Y"; None for a plain kind."""
    first, _, second = label.partition(", then ")
    return (first, second) if second else None


def make_waveform(rng: np.random.Generator, label: str, level: str = "", num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """A sound of that label as float32 (num_samples,). Raises ValueError for an unknown label or level."""
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {label!r}")
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(map(repr, LEVELS))}, got {level!r}")
    pair = halves(label)
    if pair is None:
        wave = KINDS[label].make(rng, num_samples)
    else:
        middle = num_samples // 2
        wave = np.concatenate([KINDS[pair[0]].make(rng, middle), KINDS[pair[1]].make(rng, num_samples - middle)])
    gain = LEVELS[level] * rng.uniform(0.85, 1.1)
    return np.clip(gain * wave + _hum(rng, num_samples), -0.99, 0.99).astype(np.float32)


def caption(rng: np.random.Generator, label: str, level: str = "") -> str:
    """One way to say it."""
    word = str(rng.choice(LEVEL_WORDS[level]))
    pair = halves(label)
    if pair is not None:
        first, second = (str(rng.choice(_HALF_WORDS[kind])) for kind in pair)
        text = str(rng.choice(_JOINTS)).format(first, second)
        return f"{word} {text}" if word and rng.random() < 0.3 else f"{text}, {word}" if word else text
    phrase = str(rng.choice(KINDS[label].phrases))
    if word and rng.random() < 0.25:                                         # behind: "slow clicks, loud"
        return _tidy(phrase.replace("{}", "")) + f", {word}"
    return _tidy(phrase.replace("{}", f" {word}" if word else ""))


def _tidy(text: str) -> str:
    """No space at the start, and the article that fits the word behind it."""
    words = text.split()
    for i, (article, after) in enumerate(pairwise(words)):
        if article in ("a", "an"):
            words[i] = "an" if after[0] in "aeiou" else "a"
    return " ".join(words)


def all_captions() -> list[str]:
    """Every caption there is, sorted: what the tokenizers are trained on."""
    found = set()
    for kind in KINDS.values():
        for phrase in kind.phrases:
            for word in (w for words in LEVEL_WORDS.values() for w in words):
                found.add(_tidy(phrase.replace("{}", f" {word}" if word else "")))
                found.add(_tidy(phrase.replace("{}", "")) + (f", {word}" if word else ""))
    for a, b in PAIRS:
        for joint in _JOINTS:
            found.update(joint.format(x, y) for x in _HALF_WORDS[a] for y in _HALF_WORDS[b])
    return sorted(found)


def sounds(seed: int, count: int | None = None, num_samples: int = NUM_SAMPLES) -> Iterator[Sound]:
    """Sounds of all labels in turn, shuffled; the same seed gives the same ones. Endless if count is None."""
    rng = np.random.default_rng(seed)
    weights = np.array([1.0 if halves(label) is None else _PAIR_WEIGHT for label in LABELS])
    made = 0
    while count is None or made < count:
        label = str(rng.choice(LABELS, p=weights / weights.sum()))
        level = str(rng.choice(list(LEVELS), p=list(LEVEL_SHARE.values())))
        yield Sound(make_waveform(rng, label, level, num_samples), label, level, caption(rng, label, level))
        made += 1
