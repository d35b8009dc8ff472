"""The noise schedule of the training, and which of its timesteps a sampler visits.

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps              (variance preserving)
    x_t / sqrt(alphas_cumprod[t]) = x_0 + sigma(t) eps                               (variance exploding)

References: "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, equation 4; "Improved DDPM", arXiv:2102.09672,
equation 17 (cosine schedule); "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, table 2
(timestep spacing). The roundings are those of diffusers 0.42, because the choice of timesteps is part of the result.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm2 import solver_options
from ldm2.fields import read_json, short
from ldm2.settings import SPACINGS
from ldm2.solver_options import SolverOptions

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler")
# Classes whose files describe a noise schedule of this kind. Others (TCD, EDM, flow matching, ...) belong to models
# that were trained for something else, which no sampler here would sample right.
CLASSES = (
    *_LEADING, "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)
MOST_TIMESTEPS = 100_000                                   # a limit far above every training's


@dataclass(frozen=True)
class Schedule:
    """What scheduler_config.json says, with its names.

    num_train_timesteps: T, the timesteps of the training are 0 .. T - 1
    prediction_type:     what the model returns: "epsilon", "v_prediction" (arXiv:2202.00512, appendix D), or "sample"
                         for x_0
    steps_offset:        added to the timesteps of "leading" spacing
    set_alpha_to_one:    whether DDIM and PNDM end at alphas_cumprod = 1 rather than at alphas_cumprod[0]
    trained_betas:       (T,) betas that take the place of a beta_schedule
    config:              the file itself, for the options of the solvers

    Raises ValueError for values that are out of range or not implemented.
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    trained_betas: tuple[float, ...] | None = None
    config: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _whole("num_train_timesteps", self.num_train_timesteps, 1)
        _whole("steps_offset", self.steps_offset, 0)
        if max(self.num_train_timesteps, self.steps_offset) > MOST_TIMESTEPS:
            most = f"num_train_timesteps and steps_offset must be at most {MOST_TIMESTEPS}"
            raise ValueError(f"{most}, got {self.num_train_timesteps} and {self.steps_offset}")
        for name in ("beta_start", "beta_end"):
            if not _is_beta(getattr(self, name)):
                raise ValueError(f"{name} must be a number between 0 and 1, got {getattr(self, name)!r}")
        for name, known in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES),
                             ("timestep_spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.set_alpha_to_one, bool):
            raise ValueError(f"set_alpha_to_one must be true or false, got {self.set_alpha_to_one!r}")
        betas = self.trained_betas
        if betas is not None and not (len(betas) == self.num_train_timesteps and all(map(_is_beta, betas))):
            raise ValueError(f"trained_betas must be {self.num_train_timesteps} numbers between 0 and 1, got "
                             f"{_shortened(betas)}")

    @classmethod
    def from_json(cls, path: str | Path) -> Schedule:
        """Read scheduler_config.json. Raises ValueError naming the file and the field."""
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, object], source: str = "scheduler_config.json") -> Schedule:
        """Read the fields of any of diffusers' scheduler classes; a field that is left out has that class's default."""
        if not isinstance(config, Mapping):
            raise ValueError(f"{source}: must hold a JSON object, got {type(config).__name__}")
        name = config.get("_class_name")
        if name is not None and name not in CLASSES:
            raise ValueError(f"{source}: _class_name must be one of {', '.join(CLASSES)}, got {short(name)}")
        defaults = {
            "prediction_type": "epsilon",
            "timestep_spacing": "leading" if name in (None, *_LEADING) else "linspace",
            "steps_offset": 0,
            "set_alpha_to_one": name != "PNDMScheduler",
            "trained_betas": None,
        }
        fields: dict[str, Any] = {**defaults, **config, "config": dict(config)}
        missing = [name for name in cls.__dataclass_fields__ if name not in fields]
        if missing:
            raise ValueError(f"{source}: {missing[0]} is missing")
        try:
            if fields["trained_betas"] is not None:
                fields["trained_betas"] = tuple(np.ravel(fields["trained_betas"]).tolist())
            solver_options.read(str(name), config)
            return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def options(self, scheduler: str) -> SolverOptions:
        """What the file says to the solver of a scheduler class. Raises ValueError for what is not implemented."""
        return solver_options.read(scheduler, self.config)

    def with_spacing(self, spacing: str | None) -> Schedule:
        """This schedule, visited at another spacing of the timesteps; None keeps its own."""
        return self if spacing is None else replace(self, timestep_spacing=spacing)

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64."""
        if self.trained_betas is not None:
            return np.array(self.trained_betas)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        edges = np.linspace(0, 1, self.num_train_timesteps + 1)
        alpha_bar = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(T,) float64: noise over signal, sqrt((1 - alphas_cumprod) / alphas_cumprod)."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def alpha_cumprod(self, t: float) -> float:
        """alphas_cumprod[t]; before the first timestep (t < 0) the value at which DDIM and PNDM end."""
        if t < 0:
            return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])
        return float(self.alphas_cumprod[int(t)])

    def sigma(self, t: float) -> float:
        """Noise over signal at a timestep that may lie between two trained ones (linear interpolation of sigma)."""
        return float(np.interp(t, np.arange(self.num_train_timesteps), self.sigmas))

    def within(self, t: float, interval: tuple[float, float]) -> bool:
        """Whether timestep t lies in an interval (start, end) of the run, of which 0 is pure noise and 1 the clean end.

        A run is at the share 1 - t / T, whatever the sampler and the number of its steps; the start itself is outside.
        The noise level there is `sigma(t)`: with the published schedule 53, 15.4, 4.5, 1.8, 0.79 and 0.30 at the shares
        0.05, 0.2, 0.4, 0.6, 0.8 and 0.95.
        """
        start, end = interval
        T = self.num_train_timesteps
        return start * T < max(1, T - t) <= end * T        # "leading" may begin one timestep beyond the table

    def check_steps(self, steps: int) -> int:
        """The number of sampler steps, if it is an integer from 1 to T. Raises ValueError otherwise."""
        _whole("steps", steps, 1)
        if steps > self.num_train_timesteps:
            raise ValueError(f"steps must be at most {self.num_train_timesteps}, got {steps}")
        return int(steps)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        """The timesteps of `steps` steps, descending, of the samplers that index the table: DDIM, DDPM, PNDM.

        There are always `steps` of them. (The authors' code takes a stride of T // steps over the whole table, which
        is the same where `steps` divides T and gives more steps otherwise: 167 for 150.)
        """
        spaced = self._inside(np.round(self._spaced(steps, points=self.check_steps(steps))))
        return tuple(int(t) for t in spaced)

    def interval_timesteps(self, steps: int) -> tuple[int, ...]:
        """As `timesteps`, for the samplers that space steps + 1 points and drop the last one: DPM-Solver and UniPC."""
        points = min(self.check_steps(steps) + 1, self.num_train_timesteps)
        return tuple(int(t) for t in self._inside(np.round(self._spaced(steps, points))))

    def sigma_timesteps(self, steps: int) -> tuple[float, ...]:
        """As `timesteps`, for the samplers that interpolate sigma: LMS, Euler, Heun. "linspace" is not rounded."""
        spaced = self._spaced(steps, points=self.check_steps(steps))
        return tuple(float(t) for t in spaced.astype(np.float32))

    def consistency_timesteps(self, steps: int) -> tuple[int, ...]:
        """As `timesteps`, for LCM: `steps` of those that it was trained on, which are every k-th and end at T - 1.

        Raises ValueError if there are not as many.
        """
        trained, T = self.options("LCMScheduler").original_inference_steps, self.num_train_timesteps
        if trained > T:
            raise ValueError(f"original_inference_steps must be at most {T}, got {trained}")
        if self.check_steps(steps) > trained:
            raise ValueError(f"steps must be at most {trained} with the sampler lcm (its original_inference_steps), "
                             f"got {steps}")
        chosen = np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(int)
        return tuple(int(t) for t in (trained - chosen) * (T // trained) - 1)

    def _spaced(self, steps: int, points: int) -> np.ndarray:
        """The first `steps` of `points` timesteps, descending, before rounding where the spacing leaves fractions."""
        T = self.num_train_timesteps
        if self.timestep_spacing == "leading":
            spaced: np.ndarray = np.arange(points)[::-1] * (T // points) + self.steps_offset
        elif self.timestep_spacing == "linspace":
            spaced = np.linspace(0, T - 1, points)[::-1]
        else:
            spaced = np.round(np.arange(T, 0, -T / steps)) - 1
        return spaced[:steps]

    def _inside(self, timesteps: np.ndarray) -> np.ndarray:
        """Shifted down where steps_offset leads out of the table, which happens when every timestep is visited."""
        return timesteps - max(0, timesteps[0] - (self.num_train_timesteps - 1))


def _is_beta(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and not value <= 0 and value < 1


def _shortened(values: tuple) -> str:
    return repr(values) if len(values) < 4 else f"{len(values)} of them from {values[0]!r} to {values[-1]!r}"


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
