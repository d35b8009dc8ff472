"""Options of the solvers in scheduler_config.json: which each of diffusers' scheduler classes has, and their values.

A class takes from a file of another class the options that both have, as diffusers' `from_config` does. What is not
implemented is refused with the option and its value.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SolverOptions:
    """How a solver walks, with the names of the files; the defaults are what every published checkpoint asks for.

    solver_order, solver_type: of DPM-Solver++ (1 to 3; "midpoint" or "heun") and UniPC (1 to 3; "bh1" or "bh2")
    lower_order_final:  lower orders in the last steps (of DPM-Solver++ in runs of less than 15 steps)
    euler_at_final:     the last step of DPM-Solver++ is of first order
    final_sigmas_type:  where the last step ends: "zero", or "sigma_min" for the lowest noise level of the training
    disable_corrector:  indices of UniPC's steps whose end is not corrected
    variance_type:      of DDPM: "fixed_small" is the variance of the posterior, "fixed_large" is beta_t
    skip_prk_steps:     whether PNDM does without Runge-Kutta in its first three steps
    original_inference_steps: of LCM: the steps of the training, from which its own are chosen
    timestep_scaling:   of LCM: how fast the boundary condition at timestep 0 fades with the timestep
    clip_sample, clip_sample_range: limit x_0 to -range..range
    thresholding, dynamic_thresholding_ratio, sample_max_value: limit it by dynamic thresholding, arXiv:2205.11487,
                        section 2.3, which goes before
    """

    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    disable_corrector: tuple[int, ...] = ()
    variance_type: str = "fixed_small"
    skip_prk_steps: bool = True
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    @property
    def limits(self) -> bool:
        """Whether x_0 is limited."""
        return self.clip_sample or self.thresholding


_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_MULTISTEP = ("solver_order", "solver_type", "lower_order_final", "final_sigmas_type", *_THRESHOLD)
_SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

# Class -> its options that are followed.
_FOLLOWED = {
    "DDIMScheduler": (*_CLIP, *_THRESHOLD),
    "DDPMScheduler": ("variance_type", *_CLIP, *_THRESHOLD),
    "PNDMScheduler": ("skip_prk_steps",),
    "LMSDiscreteScheduler": (),
    "EulerDiscreteScheduler": ("final_sigmas_type",),
    "EulerAncestralDiscreteScheduler": (),
    "HeunDiscreteScheduler": _CLIP,
    "DPMSolverMultistepScheduler": ("euler_at_final", *_MULTISTEP),
    "UniPCMultistepScheduler": ("disable_corrector", *_MULTISTEP),
    "LCMScheduler": ("original_inference_steps", "timestep_scaling", *_CLIP, *_THRESHOLD),
}
# Class -> its defaults where they are not those of the checkpoints; they hold for files of that class.
_DEFAULTS = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
}
# Class -> its options with one value that is implemented, which null stands for too. Those that are in neither table
# change nothing without one of these: flow_shift, sigma_min, sigma_max, time_shift_type.
_FIXED = {
    "DDIMScheduler": ("rescale_betas_zero_snr",),
    "DDPMScheduler": ("rescale_betas_zero_snr",),
    "PNDMScheduler": (),
    "LMSDiscreteScheduler": _SPACED,
    "EulerDiscreteScheduler": ("rescale_betas_zero_snr", "interpolation_type", "timestep_type", *_SPACED),
    "EulerAncestralDiscreteScheduler": ("rescale_betas_zero_snr",),
    "HeunDiscreteScheduler": _SPACED,
    "DPMSolverMultistepScheduler": (
        "rescale_betas_zero_snr", "use_lu_lambdas", "use_flow_sigmas", "lambda_min_clipped", *_SPACED
    ),
    "UniPCMultistepScheduler": (
        "rescale_betas_zero_snr", "use_flow_sigmas", "predict_x0", "solver_p", "use_dynamic_shifting", "shift_terminal",
        *_SPACED,
    ),
    "LCMScheduler": ("rescale_betas_zero_snr",),
}
_ONLY = {
    "rescale_betas_zero_snr": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False, "use_dynamic_shifting": False,
    "interpolation_type": "linear", "timestep_type": "discrete", "lambda_min_clipped": -math.inf, "predict_x0": True,
    "solver_p": None, "shift_terminal": None,
}
# Types of one multistep solver that the other takes for its own default.
_TYPES = {
    "DPMSolverMultistepScheduler": {"midpoint": "midpoint", "heun": "heun"} | dict.fromkeys(
        ("logrho", "bh1", "bh2"), "midpoint"),
    "UniPCMultistepScheduler": {"bh1": "bh1", "bh2": "bh2"} | dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
}
_VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", None: "fixed_small",
              "fixed_large": "fixed_large"}


def read(scheduler: str, config: Mapping[str, object]) -> SolverOptions:
    """What a scheduler_config.json says to the class `scheduler`; classes that are not known here have no options.

    Raises ValueError naming option and value for what is impossible or not implemented.
    """
    for name in _FIXED.get(scheduler, ()):
        if name in config and config[name] is not None and config[name] != _ONLY[name]:
            raise _error(name, repr(_ONLY[name]), config[name])
    if scheduler == "DPMSolverMultistepScheduler":
        _ALGORITHM("algorithm_type", config.get("algorithm_type", "dpmsolver++"))
        if config.get("variance_type") in ("learned", "learned_range"):
            raise _error("variance_type", "one that is not learned", config["variance_type"])
    own = _DEFAULTS.get(scheduler, {}) if config.get("_class_name") == scheduler else {}
    given = {name: config[name] for name in _FOLLOWED.get(scheduler, ()) if name in config}
    options = SolverOptions(**{name: _check(scheduler, name, value) for name, value in {**own, **given}.items()})
    ends_high = options.solver_order > 1 and not options.lower_order_final   # with an extrapolation to infinity
    if scheduler == "UniPCMultistepScheduler" and ends_high and options.final_sigmas_type == "zero":
        raise _error("lower_order_final", "True where final_sigmas_type is 'zero'", False)
    return options


def _check(scheduler: str, name: str, value: object) -> Any:
    if name == "solver_type":
        return _one_of(_TYPES[scheduler])(name, value)
    return _RULES[name](name, value)


def _one_of(values: Mapping) -> Callable[[str, object], object]:
    """A rule for names: each value with the one that it means."""
    def rule(name: str, value: object) -> object:
        if not isinstance(value, (str, int, type(None))) or isinstance(value, bool) or value not in values:
            raise _error(name, f"one of {', '.join(str(each) for each in values if each is not None)}", value)
        return values[value]

    return rule


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _error(name, "True or False", value)
    return value


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value <= 0 or not value < math.inf:
        raise _error(name, "a positive number", value)
    return float(value)


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise _error(name, "a positive integer", value)
    return value


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value < 0 or not value <= 1:
        raise _error(name, "a number from 0 to 1", value)
    return float(value)


def _indices(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(each) is int and each >= 0 for each in value):
        raise _error(name, "a list of integers of at least 0", value)
    return tuple(value)


def _error(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {rule}, got {value!r}")


_ALGORITHM = _one_of({"dpmsolver++": "dpmsolver++", "sde-dpmsolver++": "sde-dpmsolver++"})
_RULES: dict[str, Callable[[str, object], object]] = {
    "solver_order": _one_of({1: 1, 2: 2, 3: 3}),
    "lower_order_final": _flag,
    "euler_at_final": _flag,
    "final_sigmas_type": _one_of({"zero": "zero", "sigma_min": "sigma_min"}),
    "disable_corrector": _indices,
    "variance_type": _one_of(_VARIANCES),
    "skip_prk_steps": _flag,
    "original_inference_steps": _count,
    "timestep_scaling": _positive,
    "clip_sample": _flag,
    "clip_sample_range": _positive,
    "thresholding": _flag,
    "dynamic_thresholding_ratio": _share,
    "sample_max_value": _positive,
}
