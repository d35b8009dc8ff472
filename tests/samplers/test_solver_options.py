"""Every option of every scheduler class of diffusers: followed step by step, or refused with its name and value."""

import inspect
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch

from ldm2.noise import SeededNoise
from ldm2.samplers import SAMPLERS, sample
from ldm2.schedules import Schedule
from tests.helpers import PUBLISHED
from tests.samplers.toy import SHAPE, diffusers_walk, draw_latents, error, knowing, model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")   # in diffusers

CLASSES = {sampler.scheduler: name for name, sampler in SAMPLERS.items() if name != "dpmpp-2m-sde"}
# Values that no class has as its default, for every argument of every class.
VALUES = {
    "num_train_timesteps": [500],
    "beta_start": [0.0005],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "trained_betas": [np.linspace(0.001, 0.01, 1000).tolist(), [0.1, 0.2]],
    "prediction_type": ["v_prediction", "sample", "flow_prediction"],
    "timestep_spacing": ["linspace", "trailing", "uniform"],
    "steps_offset": [0, 3],
    "set_alpha_to_one": [True, False],
    "clip_sample": [True],
    "clip_sample_range": [0.5, 3.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.5],
    "sample_max_value": [2.0],
    "rescale_betas_zero_snr": [True],
    "variance_type": ["fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "skip_prk_steps": [True, False],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "interpolation_type": ["log_linear"],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "timestep_type": ["continuous"],
    "final_sigmas_type": ["sigma_min", "sigma_max"],
    "solver_order": [1, 3, 4],
    "solver_type": ["heun", "midpoint", "bh1", "bh2", "logrho", "euler"],
    "lower_order_final": [False],
    "euler_at_final": [True],
    "algorithm_type": ["sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"],
    "lambda_min_clipped": [-5.1],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "predict_x0": [False],
    "disable_corrector": [[0, 2]],
    "solver_p": ["ddim"],
    "shift_terminal": [0.1],
    "original_inference_steps": [20, 100, 2000],
    "timestep_scaling": [0.01],
}
# What is refused, of what diffusers computes.
REFUSED = {
    "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas", "interpolation_type", "timestep_type", "lambda_min_clipped", "predict_x0", "solver_p",
    ("beta_schedule", "sigmoid"), ("beta_schedule", "laplace"), ("prediction_type", "flow_prediction"),
    ("DDPMScheduler", "variance_type", "fixed_large_log"), ("variance_type", "learned"),
    ("variance_type", "learned_range"), ("algorithm_type", "dpmsolver"), ("algorithm_type", "sde-dpmsolver"),
    ("solver_order", 4), ("trained_betas", "2 numbers"),
    ("LCMScheduler", "timestep_spacing", "uniform"),       # LCM has its own, and looks at none there
    ("UniPCMultistepScheduler", "lower_order_final"),      # alone it leads to NaN there
}
# Options that need another one to count.
WITH = {
    "clip_sample_range": {"clip_sample": True},
    "dynamic_thresholding_ratio": {"thresholding": True, "sample_max_value": 3.0},
    "sample_max_value": {"thresholding": True},
    "bh1": {"final_sigmas_type": "sigma_min"},             # from which it leads to NaN there
}
CASES = [
    (scheduler, name, value)
    for scheduler in CLASSES
    for name in list(inspect.signature(getattr(diffusers, scheduler).__init__).parameters)[1:]
    for value in VALUES[name]
]
# Several at once, where one changes what another means.
TOGETHER = [
    ("DPMSolverMultistepScheduler", options | more)
    for options in ({"solver_order": 3}, {"solver_order": 2, "solver_type": "heun"}, {"solver_order": 1})
    for more in ({}, {"lower_order_final": False}, {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
                 {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, {"thresholding": True})
] + [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | more)
    for more in ({"solver_order": 1}, {"solver_type": "heun"}, {"final_sigmas_type": "sigma_min"})
] + [
    ("UniPCMultistepScheduler", {"solver_order": order, "solver_type": kind} | more)
    for order in (1, 2, 3) for kind in ("bh1", "bh2")
    for more in ({}, {"disable_corrector": [1, 2, 3]}, {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
                 {"disable_corrector": [0], "final_sigmas_type": "sigma_min"})
    if kind == "bh2" or "final_sigmas_type" in more
] + [
    ("DDIMScheduler", {"clip_sample": True, "prediction_type": kind}) for kind in ("v_prediction", "sample")
] + [
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"thresholding": True, "variance_type": "fixed_large", "sample_max_value": 4.0}),
]


def theirs(scheduler, steps, options, eta=0.0):
    """(its config, the latents of diffusers' loop), the latter None where diffusers refuses."""
    cls = getattr(diffusers, scheduler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = cls.from_config(diffusers.DDIMScheduler.from_config(PUBLISHED).config, **options)
            made.set_timesteps(steps)
            generator = torch.Generator().manual_seed(7)
            x_T = torch.randn((1, *SHAPE), generator=generator) * made.init_noise_sigma
            latents = diffusers_walk(made, x_T, made.timesteps, generator, eta)[-1][1]
    except Exception:
        return PUBLISHED | options, None
    return dict(made.config), latents


def ours(scheduler, steps, config, eta=0.0):
    name = CLASSES[scheduler]
    if config.get("algorithm_type") == "sde-dpmsolver++":
        name = "dpmpp-2m-sde"
    schedule = Schedule.from_dict(config | {"_class_name": scheduler})
    noise = SeededNoise([7])
    return sample(name, model, noise.draw(*SHAPE), schedule, steps, noise=noise, eta=eta)


@pytest.mark.parametrize("scheduler, name, value", CASES)
def test_each_option_is_followed_or_refused(scheduler, name, value):
    plain = f"{len(value)} numbers" if isinstance(value, list) else value
    options = WITH.get(name, {}) | WITH.get(plain, {}) | {name: value}
    for steps in (5, 17):
        config, expected = theirs(scheduler, steps, options)
        if (name, value) == ("prediction_type", "sample") and expected is None:
            assert torch.isfinite(ours(scheduler, steps, config)).all()     # some classes of diffusers do not have it
            continue
        refused = {name, (name, plain), (scheduler, name), (scheduler, name, plain)} & REFUSED
        if refused or expected is None or not torch.isfinite(expected).all():
            with pytest.raises(ValueError, match=name) as raised:
                ours(scheduler, steps, config | options)
            said = str(raised.value)
            assert "\n" not in said and (repr(value) in said or isinstance(value, list))
        else:
            assert error(ours(scheduler, steps, config), expected) < 5e-5


@pytest.mark.parametrize("scheduler, options", TOGETHER)
def test_options_together_are_followed(scheduler, options):
    for steps in (4, 5, 14, 15, 17):
        config, expected = theirs(scheduler, steps, options)
        assert error(ours(scheduler, steps, config), expected) < 5e-5, steps


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True, "sample_max_value": 3.0}])
def test_limits_of_ddim_leave_the_direction_of_its_noise(options):
    config, expected = theirs("DDIMScheduler", 7, options, eta=0.7)
    assert error(ours("DDIMScheduler", 7, config, eta=0.7), expected) < 5e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_with_bh1_ends_at_x0_where_diffusers_ends_in_nan(order):
    config = PUBLISHED | {"solver_order": order, "solver_type": "bh1"}
    x0 = draw_latents(1)
    latents = sample("unipc", knowing(x0), draw_latents(2), Schedule.from_dict(config), 9)
    assert error(latents, x0) < 1e-4


def test_dynamic_thresholding_takes_a_quantile_of_each_row():
    from ldm2.samplers.core import Epsilon
    from ldm2.solver_options import SolverOptions

    x0 = torch.stack([torch.linspace(-4, 4, 9), torch.linspace(-0.5, 0.5, 9)])[:, None]
    options = SolverOptions(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=10)
    limited = Epsilon(model, Schedule.from_dict(PUBLISHED), options).limit(x0)
    assert torch.equal(limited[0, 0], torch.linspace(-4, 4, 9).clamp(-2, 2) / 2)           # the median of |x0| is 2
    assert torch.equal(limited[1], x0[1])                                                    # 0.25 counts as 1


@pytest.mark.parametrize("options, message", [
    ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order must be 1 or 2 .*sde-dpmsolver.*got 3"),
    ({"solver_order": True}, "solver_order must be one of 1, 2, 3, got True"),
    ({"solver_order": "2"}, "solver_order must be one of 1, 2, 3, got '2'"),
    ({"lower_order_final": "no"}, "lower_order_final must be True or False, got 'no'"),
])
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours("DPMSolverMultistepScheduler", 5, PUBLISHED | options)


@pytest.mark.parametrize("steps", [1, 3])
def test_runge_kutta_steps_need_four_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 4 .*skip_prk_steps.* got {steps}"):
        ours("PNDMScheduler", steps, PUBLISHED | {"skip_prk_steps": False})


def test_a_class_takes_from_another_file_what_it_has_too():
    file = PUBLISHED | {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_lu_lambdas": False}
    schedule = Schedule.from_dict(file)
    assert schedule.options("UniPCMultistepScheduler").solver_order == 3
    assert schedule.options("DDIMScheduler") == Schedule.from_dict(PUBLISHED).options("DDIMScheduler")
    assert schedule.options("DDPMScheduler").clip_sample is False


def test_an_infinite_number_in_the_file_is_read(tmp_path):
    (tmp_path / "x.json").write_text(
        '{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "num_train_timesteps": 1000, '
        '"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}')
    assert Schedule.from_json(tmp_path / "x.json").config["lambda_min_clipped"] == -math.inf
