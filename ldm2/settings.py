"""What is asked for: every setting of one call, checked, with the defaults filled in.

A Recipe and the name of the model are all that is needed to make a sound again.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

WHOLE_RUN = (0.0, 1.0)
DEFAULTS = {
    "seconds": 10.24, "steps": 200, "guidance_scale": 3.5, "sampler": "ddim", "guidance_interval": WHOLE_RUN,
    "reuse": 1, "spacing": None,
}
# What takes the place of the defaults by one name; `python -m benchmarks.tradeoff` measures the price.
PRESETS = {
    "fast": {"steps": 25, "sampler": "dpmpp-2m", "guidance_interval": (0.0, 0.7), "spacing": "trailing"},
}
PER_PROMPT = ("prompt", "negative_prompt", "transcription", "phonemes")
MAX_SECONDS = 600.0
NUM_SEEDS = 2**64                                          # of a torch.Generator


@dataclass(frozen=True)
class Recipe:
    """Checked settings. Rows are ordered prompt by prompt: waveform j of prompt i is row i * num_waveforms + j."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    seconds: float
    steps: int
    guidance_scale: float
    sampler: str
    eta: float
    seeds: tuple[int, ...]
    num_waveforms: int
    transcription: tuple[str, ...] | None = None
    phonemes: tuple[str, ...] | None = None
    window: float | None = None
    overlap: float | None = None
    loop: bool = False
    prompt_at: tuple[tuple[float, str], ...] = ()
    guidance_interval: tuple[float, float] = WHOLE_RUN
    reuse: int = 1
    spacing: str | None = None

    @property
    def guided(self) -> bool:
        """Whether two branches are needed: a scale of one or less is the conditional prediction alone."""
        return self.guidance_scale > 1

    @property
    def settings(self) -> dict:
        """The arguments of `generate` that make the same rows again, as plain values."""
        return {
            "prompt": _one_or_list(self.prompts),
            "negative_prompt": _one_or_list(self.negative_prompts),
            "transcription": _one_or_list(self.transcription),
            "phonemes": _one_or_list(self.phonemes),
            "seconds": self.seconds,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "eta": self.eta,
            "seed": _one_or_list(self.seeds),
            "num_waveforms": self.num_waveforms,
            "window": self.window,
            "overlap": self.overlap,
            "loop": self.loop,
            "prompt_at": [list(change) for change in self.prompt_at],
            "guidance_interval": list(self.guidance_interval),
            "reuse": self.reuse,
            "spacing": self.spacing,
        }


def row_settings(settings: dict, row: int, seed: int) -> dict:
    """The settings that make one row of a call again, alone: its own prompts and the seed that the row ended with."""
    index = row // settings["num_waveforms"]
    own = {name: settings[name][index] for name in PER_PROMPT if isinstance(settings[name], list)}
    return settings | own | {"seed": seed, "num_waveforms": 1}


def _one_or_list(values: tuple | None) -> object:
    return values if values is None else values[0] if len(values) == 1 else list(values)


def recipe(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    seed: int | Sequence[int] | None = None,
    num_waveforms: int = 1,
    transcription: str | Sequence[str] | None = None,
    phonemes: str | Sequence[str] | None = None,
    window: float | None = None,
    overlap: float | None = None,
    loop: bool = False,
    prompt_at: Sequence[tuple[float, str]] = (),
    preset: str | None = None,
    guidance_interval: tuple[float, float] | None = None,
    reuse: int | None = None,
    spacing: str | None = None,
    defaults: Mapping[str, object] = DEFAULTS,
) -> Recipe:
    """Check the arguments of a call; None takes the value from the preset, or else from `defaults`.

    seed: one number s gives the rows seeds s, s + 1, ...; a list gives each row its own; None draws one.

    Raises ValueError naming value and rule.
    """
    from ldm2.samplers import check_settings

    prompts = check_prompts(prompt)
    num_waveforms = check_count("num_waveforms", num_waveforms)
    given = {
        "seconds": seconds, "steps": steps, "guidance_scale": guidance_scale, "sampler": sampler,
        "guidance_interval": guidance_interval, "reuse": reuse, "spacing": spacing,
    }
    chosen = {**defaults, **preset_settings(preset), **{name: v for name, v in given.items() if v is not None}}
    steps, sampler = check_count("steps", chosen["steps"]), chosen["sampler"]
    check_settings(sampler, steps, eta)
    seconds = check_seconds(chosen["seconds"])
    return Recipe(
        prompts=prompts,
        negative_prompts=check_texts("negative_prompt", negative_prompt, len(prompts)),
        seconds=seconds,
        steps=steps,
        guidance_scale=check_number("guidance_scale", chosen["guidance_scale"]),
        sampler=sampler,
        eta=float(eta),
        seeds=check_seeds(seed, len(prompts) * num_waveforms),
        num_waveforms=num_waveforms,
        transcription=check_texts("transcription", transcription, len(prompts)),
        phonemes=check_texts("phonemes", phonemes, len(prompts)),
        window=check_window("window", window),
        overlap=check_window("overlap", overlap, smallest=0),
        loop=check_flag("loop", loop),
        prompt_at=check_prompt_at(prompt_at, seconds),
        guidance_interval=check_interval(chosen["guidance_interval"]),
        reuse=check_count("reuse", chosen["reuse"]),
        spacing=check_spacing(chosen["spacing"]),
    )


def preset_settings(name: str | None) -> Mapping[str, object]:
    """The settings of a preset; none for None."""
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def check_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt or a list of prompts as a tuple; none of them empty."""
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
    if not prompts:
        raise ValueError("the list of prompts is empty")
    for p in prompts:
        if not p.strip():
            raise ValueError(f"a prompt must not be empty, got {p!r}")
    return tuple(prompts)


def check_texts(name: str, texts: str | Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """A text for each of `count` prompts: one for all, or a list of the same length; None stays None."""
    if texts is None:
        return None
    spread = (texts,) * count if isinstance(texts, str) else texts
    if not isinstance(spread, Sequence) or not all(isinstance(text, str) for text in spread):
        raise ValueError(f"{name} must be a string or a list of strings, got {texts!r}")
    if len(spread) != count:
        raise ValueError(f"{len(spread)} texts for {name} and {count} prompts: give one for all, or one for each")
    return tuple(spread)


def check_count(name: str, value: int) -> int:
    """A whole number from 1 up."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
    return int(value)


def check_flag(name: str, value: bool) -> bool:
    """True or False."""
    if value not in (False, True):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_number(name: str, value: float) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_seconds(seconds: float) -> float:
    """A length of sound in seconds, above zero and at most MAX_SECONDS."""
    seconds = check_number("seconds", seconds)
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds must be above 0 and at most {MAX_SECONDS:g}, got {seconds:g}")
    return seconds


def check_window(name: str, seconds: float | None, smallest: float = 0.001) -> float | None:
    """A length in seconds of at least `smallest`, or None for the model's own."""
    if seconds is None:
        return None
    seconds = check_number(name, seconds)
    if seconds < smallest:
        raise ValueError(f"{name} must be at least {smallest:g} seconds, got {seconds:g}")
    return seconds


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """A part (start, end) of the run with 0 <= start <= end <= 1; empty if both are equal."""
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise ValueError(f"guidance_interval must be (start, end), got {interval!r}")
    start, end = (check_number("guidance_interval", share) for share in interval)
    if not 0 <= start <= end <= 1:
        raise ValueError(f"guidance_interval must have 0 <= start <= end <= 1, got {start:g} to {end:g}")
    return start, end


def check_spacing(spacing: str | None) -> str | None:
    """The name of a spacing of timesteps, or None for the checkpoint's own."""
    from ldm2.schedules import SPACINGS

    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}, choose from {', '.join(SPACINGS)}")
    return spacing


def check_prompt_at(changes: Sequence[tuple[float, str]], seconds: float) -> tuple[tuple[float, str], ...]:
    """(seconds, prompt) from where on other prompts hold: ascending, inside the sound, none of them empty."""
    if not isinstance(changes, Sequence) or not all(isinstance(c, Sequence) and len(c) == 2 for c in changes):
        raise ValueError(f"prompt_at must be a list of (seconds, prompt), got {changes!r}")
    checked: list[tuple[float, str]] = []
    for start, text in changes:
        start = check_number("the time of a prompt", start)
        if not 0 < start < seconds:
            raise ValueError(f"a prompt must begin inside the {seconds:g} seconds of sound, after 0, got {start:g}")
        if checked and start <= checked[-1][0]:
            raise ValueError(f"prompts over time must be in order, got {start:g} after {checked[-1][0]:g}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a prompt over time must be a string that is not empty, got {text!r}")
        checked.append((start, text))
    return tuple(checked)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The seed of each of `count` rows, from 0 to 2**64 - 1.

    One number counts on from row to row, and from 2**64 - 1 on to 0. A negative one means what torch makes of it: -1 is
    2**64 - 1.
    """
    if seed is None:
        seed = secrets.randbelow(2**31)
    seeds = seed if isinstance(seed, Sequence) and not isinstance(seed, str) else None
    if seeds is None:
        first = check_seed(seed)
        return tuple((first + i) % NUM_SEEDS for i in range(count))
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} waveforms: give one number, or one for each")
    return tuple(check_seed(value) for value in seeds)


def check_seed(seed: int) -> int:
    """A whole number that a torch.Generator takes, -2**63 to 2**64 - 1, as the one from 0 up that means the same."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -NUM_SEEDS // 2 <= int(seed) < NUM_SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1 (or negative, from -2**63), got {seed!r}")
    return int(seed) % NUM_SEEDS
