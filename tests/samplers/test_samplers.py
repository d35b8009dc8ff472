"""Samplers: what must come out when the model is right, the driver's promises, and errors."""

import math
from dataclasses import replace

import pytest
import torch

from ldm2 import samplers
from ldm2.noise import SeededNoise
from ldm2.samplers import SAMPLERS, Cancelled, sample
from ldm2.samplers.consistency import boundary
from ldm2.samplers.core import variance_preserving
from ldm2.samplers.ode import adams_bashforth
from tests.samplers.toy import SCHEDULE, SHAPE, STOCHASTIC, draw_latents, error, knowing, model

# ------------------------------------------------------------------------------------------------ what must come out


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_knows_x0_leads_to_x0(name, start):
    schedule = replace(SCHEDULE, set_alpha_to_one=True)
    x0 = draw_latents(1, rows=2)
    latents = sample(name, knowing(x0), draw_latents(2, rows=2), schedule, 6, x0=x0, start=start,
                     noise=SeededNoise([0, 1]))
    assert error(latents, x0) < 1e-4


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])    # it wants a model that jumps
def test_a_model_of_the_unit_normal_keeps_the_noise(name):
    # E[eps | x_t] = sigma x_t for data of variance one: the flow of the ODE is the identity, and noise stays noise
    shape = (1, 4, 100, 25)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def denoiser(x, t):
        sigma = SCHEDULE.sigma(t)
        return sigma / math.hypot(1, sigma) * x

    latents = sample(name, denoiser, x_T, SCHEDULE, 200, noise=SeededNoise([0]))
    if name in STOCHASTIC:
        assert latents.std() == pytest.approx(1, abs=0.05)
    else:
        assert error(latents, x_T) < 0.03


def two_points(x, t):
    """The exact denoiser of data that is -1 or +1 everywhere, E[x_0 | x_t] = tanh(alpha x_t / sigma^2)."""
    alpha, sigma = variance_preserving(SCHEDULE.sigma(t))
    return (x - alpha * torch.tanh(alpha * x / sigma**2)) / sigma


def state_at_301(name, steps):
    """The state, scaled to variance one, after steps from the same state at timestep 801 down to 301."""
    timesteps, states = samplers.timesteps(name, SCHEDULE, steps), {}

    def edit(step):
        states[step.t] = step.x_t / math.hypot(step.signal, step.sigma)
        return step.x_t

    start = timesteps.index(801)
    sample(name, two_points, draw_latents(2), SCHEDULE, steps, x0=torch.zeros(1, *SHAPE), start=start, edit=edit)
    return states[301]


@pytest.mark.parametrize("name, order, steps", [
    ("ddim", 1, 20), ("euler", 1, 20), ("heun", 2, 20), ("lms", 2, 20), ("pndm", 2, 20), ("dpmpp-2m", 2, 19),
    ("unipc", 2, 19),
])
def test_the_error_falls_with_the_order_of_the_method(name, order, steps):
    exact = state_at_301("heun", 500)
    coarse = error(state_at_301(name, steps), exact)                         # strides of 50 and 25
    fine = error(state_at_301(name, 2 * steps + steps % 2), exact)
    assert coarse / fine > 0.8 * 2**order


def test_adams_bashforth_weights_are_the_textbook_ones_on_even_nodes():
    weights = adams_bashforth([3.0, 2.0, 1.0, 0.0], 4.0)
    assert weights == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24], rel=1e-12)


def test_adams_bashforth_integrates_cubics_on_uneven_nodes_exactly():
    nodes, end = [5.0, 6.1, 9.0, 14.6], 4.2
    weights = adams_bashforth(nodes, end)
    for power in range(4):
        integral = (end ** (power + 1) - nodes[0] ** (power + 1)) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes)) == pytest.approx(integral, rel=1e-11)


def test_lcm_returns_its_input_at_timestep_zero_and_x0_far_from_it():
    assert boundary(0) == (1, 0)                          # arXiv:2303.01469, equation 5: f(x, 0) = x
    assert boundary(0.5) == pytest.approx((0.5, 0.5**0.5))                   # at sigma_data
    assert boundary(1e6) == pytest.approx((0, 1), abs=1e-9)


def test_ddim_in_one_step_is_the_closed_form():
    x_T = draw_latents(2)
    a, a_prev = SCHEDULE.alpha_cumprod(1), SCHEDULE.alpha_cumprod(0)
    x0 = (x_T - math.sqrt(1 - a) * model(x_T, 1)) / math.sqrt(a)
    wanted = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * model(x_T, 1)
    assert error(sample("ddim", model, x_T, SCHEDULE, 1), wanted) < 1e-6


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])   # its history holds v itself
def test_v_prediction_gives_what_eps_prediction_gives(name):
    def velocity(x, t):                                   # v = (eps - sigma x) / alpha
        alpha, sigma = variance_preserving(SCHEDULE.sigma(t))
        return (model(x, t) - sigma * x) / alpha

    schedule = replace(SCHEDULE, prediction_type="v_prediction")
    latents = sample(name, velocity, draw_latents(2), schedule, 5, noise=SeededNoise([0]))
    assert error(latents, sample(name, model, draw_latents(2), SCHEDULE, 5, noise=SeededNoise([0]))) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_as_many_steps_as_timesteps_are_finite(name):
    # diffusers divides by zero or indexes out of its table in most of these
    for steps in (39, 40):
        schedule = replace(SCHEDULE, num_train_timesteps=40, config={"original_inference_steps": 40})
        latents = sample(name, model, draw_latents(2), schedule, steps, noise=SeededNoise([0]))
        assert latents.isfinite().all(), steps


# ------------------------------------------------------------------------------------------------------- the driver

def watch(name, steps, **settings):
    """The Steps that a run offers to `edit`."""
    seen = []

    def edit(step):
        seen.append(step)
        return step.x_t

    sample(name, model, draw_latents(2), SCHEDULE, steps, noise=SeededNoise([0]), edit=edit, **settings)
    return seen


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_sees_variance_one_and_listed_timesteps_only(name):
    x_T, seen = torch.randn(1, 8, 40, 16, generator=torch.Generator().manual_seed(0)), []

    def denoiser(x, t):
        seen.append((t, float(x.std())))
        return model_of_noise(x, t)

    def model_of_noise(x, t):
        sigma = SCHEDULE.sigma(t)
        return sigma / math.hypot(1, sigma) * x

    sample(name, denoiser, x_T, SCHEDULE, 9, noise=SeededNoise([0]))
    assert {t for t, _ in seen} == set(samplers.timesteps(name, SCHEDULE, 9))
    assert seen[0][1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_edit_is_called_once_before_each_step(name):
    steps = watch(name, 6, x0=draw_latents(1), start=2)
    assert [step.index for step in steps] == [2, 3, 4, 5]
    assert tuple(step.t for step in steps) == samplers.timesteps(name, SCHEDULE, 6)[2:]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_tells_its_levels_in_the_samplers_coordinates(name):
    for step in watch(name, 6):
        assert step.sigma / step.signal == pytest.approx(SCHEDULE.sigma(step.t), rel=1e-12)
        assert step.signal == 1 or math.hypot(step.signal, step.sigma) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_edit_returns_is_what_the_model_sees(name):
    x0, expected = draw_latents(1), []

    def edit(step):
        x_t = step.signal * x0 + step.sigma * draw_latents(5)
        expected.append(x_t / math.hypot(step.signal, step.sigma))
        return x_t

    def denoiser(x, t):
        if expected:                                      # the first call of the step
            torch.testing.assert_close(x, expected.pop())
        return model(x, t)

    sample(name, denoiser, draw_latents(2), SCHEDULE, 4, noise=SeededNoise([0]), edit=edit)
    assert not expected


def hold(name, draw_noise):
    """Latents of a run in which the first three frames are held at x0 and the model is right about them; and x0."""
    x0, mask = draw_latents(1), torch.zeros(1, 1, 5, 1)
    mask[:, :, :3] = 1
    right, schedule = knowing(x0), replace(SCHEDULE, set_alpha_to_one=True)

    def denoiser(x, t):
        return mask * right(x, t) + (1 - mask) * model(x, t)

    def edit(step):
        return mask * (step.signal * x0 + step.sigma * draw_noise()) + (1 - mask) * step.x_t

    return sample(name, denoiser, draw_latents(2), schedule, 8, noise=SeededNoise([0]), edit=edit), x0


@pytest.mark.parametrize("name", SAMPLERS)
def test_masked_editing_with_one_noise_keeps_the_masked_part(name):
    latents, x0 = hold(name, lambda: draw_latents(3))
    torch.testing.assert_close(latents[:, :, :3], x0[:, :, :3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lms", "pndm")])
def test_masked_editing_with_fresh_noise_keeps_the_masked_part(name):
    # not lms and pndm: they extrapolate along the eps of steps that saw other noise
    fresh = torch.Generator().manual_seed(4)
    latents, x0 = hold(name, lambda: torch.randn((1, *SHAPE), generator=fresh))
    torch.testing.assert_close(latents[:, :, :3], x0[:, :, :3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_masked_editing_leaves_the_rest_alone(name):
    schedule = replace(SCHEDULE, set_alpha_to_one=True)
    latents, _ = hold(name, lambda: draw_latents(3))
    free = sample(name, model, draw_latents(2), schedule, 8, noise=SeededNoise([0]))
    torch.testing.assert_close(latents[:, :, 3:], free[:, :, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_at_the_end_returns_x0(name):
    x0 = draw_latents(1)
    assert torch.equal(sample(name, model, draw_latents(2), SCHEDULE, 5, x0=x0, start=5, noise=SeededNoise([0])), x0)


def test_start_at_the_beginning_without_x0_is_pure_noise():
    latents = sample("euler", model, draw_latents(2), SCHEDULE, 5)
    assert torch.equal(sample("euler", model, draw_latents(2), SCHEDULE, 5, x0=None, start=0), latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_is_float32_for_models_of_half_precision(name, dtype):
    def half(x, t):
        assert x.dtype == torch.float32
        return model(x, t).to(dtype)

    latents = sample(name, half, draw_latents(2).to(dtype), SCHEDULE, 3, noise=SeededNoise([0]))
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_stops_the_run_by_returning_false(name):
    seen = []

    def callback(done, total, latents):
        seen.append((done, total))
        return done < 2

    with pytest.raises(Cancelled, match="stopped after step 2 of 5"):
        sample(name, model, draw_latents(2), SCHEDULE, 5, noise=SeededNoise([0]), callback=callback)
    assert seen == [(1, 5), (2, 5)]


def test_a_callback_that_returns_nothing_does_not_stop_the_run():
    sample("ddim", model, draw_latents(2), SCHEDULE, 3, callback=lambda done, total, latents: None)


def test_the_start_is_not_changed_in_place():
    x_T = draw_latents(2)
    sample("euler", model, x_T, SCHEDULE, 2)
    assert torch.equal(x_T, draw_latents(2))


# ----------------------------------------------------------------------------------------------------------- errors

def test_lcm_takes_no_more_steps_than_its_model_was_trained_on():
    with pytest.raises(ValueError, match=r"steps must be at most 50 .*lcm.*, got 51"):
        sample("lcm", model, draw_latents(2), SCHEDULE, 51, noise=SeededNoise([0]))


@pytest.mark.parametrize("name", ["DDIM", "dpm", "", None, 3, ["ddim"]])
def test_an_unknown_sampler_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="choose from ddim, ddpm, pndm, lms, euler, euler-ancestral, heun, dpmpp-2m, "
                                         "dpmpp-2m-sde, unipc, lcm"):
        sample(name, model, draw_latents(2), SCHEDULE, 5)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, 1001, "5", None])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"steps must be .*, got "):
        sample("ddim", model, draw_latents(2), SCHEDULE, steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "5", None])
def test_a_bad_number_of_steps_is_refused_without_a_schedule(steps):
    with pytest.raises(ValueError, match=r"steps must be a positive integer, got "):
        samplers.check_settings("ddim", steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf, True, "1", None])
def test_a_bad_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1, got "):
        sample("ddim", model, draw_latents(2), SCHEDULE, 5, eta=eta, noise=SeededNoise([0]))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddim"])
def test_eta_is_refused_where_it_means_nothing(name):
    with pytest.raises(ValueError, match=f"only the sampler ddim takes an eta above 0, got eta 0.5 with {name}"):
        sample(name, model, draw_latents(2), SCHEDULE, 5, eta=0.5, noise=SeededNoise([0]))


@pytest.mark.parametrize("name, eta", [("ddim", 0.5), *((name, 0.0) for name in STOCHASTIC)])
def test_stochastic_samplers_need_noise(name, eta):
    with pytest.raises(ValueError, match="draws noise"):
        sample(name, model, draw_latents(2), SCHEDULE, 5, eta=eta)


@pytest.mark.parametrize("start", [-1, 6, 1.0, True, None])
def test_start_must_be_one_of_the_steps(start):
    with pytest.raises(ValueError, match=r"start must be .*5"):
        sample("ddim", model, draw_latents(2), SCHEDULE, 5, x0=draw_latents(1), start=start)


def test_starting_late_needs_x0():
    with pytest.raises(ValueError, match="start 2 needs the latents x0"):
        sample("ddim", model, draw_latents(2), SCHEDULE, 5, start=2)


def test_x0_must_have_the_shape_of_the_noise():
    with pytest.raises(ValueError, match=r"x0 \(1, 4, 5, 3\).*x_T \(2, 4, 5, 3\)"):
        sample("ddim", model, draw_latents(2, rows=2), SCHEDULE, 5, x0=draw_latents(1), start=2)


def test_a_denoiser_must_return_the_shape_of_its_input():
    with pytest.raises(ValueError, match=r"denoiser.*\(2, 4, 5, 3\).*x_t \(1, 4, 5, 3\)"):
        sample("ddim", lambda x, t: torch.cat([x, x]), draw_latents(2), SCHEDULE, 5)
