"""Noise schedules against diffusers' tables and the authors' (tests/data/golden_samplers.md)."""

import json
import math
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
from safetensors.torch import load_file

from ldm2.samplers import SAMPLERS, timesteps
from ldm2.schedules import BETA_SCHEDULES, SPACINGS, Schedule
from tests.helpers import PUBLISHED

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")   # in diffusers

SCHEDULE = Schedule.from_dict(PUBLISHED)


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent / "data" / "golden_samplers.safetensors")


def config(**changes):
    return PUBLISHED | changes


def test_alphas_cumprod_equal_the_authors_table(golden):
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, golden["schedule.alphas_cumprod_f64"].numpy(), rtol=1e-12)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alphas_cumprod_equal_diffusers_in_its_float32(beta_schedule):
    changed = config(beta_schedule=beta_schedule)
    theirs = diffusers.DDIMScheduler.from_config(changed)
    np.testing.assert_allclose(Schedule.from_dict(changed).alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5)


def test_cosine_alphas_cumprod_follow_the_closed_form():
    cosine = replace(SCHEDULE, beta_schedule="squaredcos_cap_v2")
    for t in (0, 10, 500, 900):
        f = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (0, t + 1)]
        assert cosine.alphas_cumprod[t] == pytest.approx(f[1] / f[0], rel=1e-9)


def test_cosine_betas_stay_below_one():
    assert replace(SCHEDULE, beta_schedule="squaredcos_cap_v2").betas.max() == 0.999


def test_linear_betas_run_from_start_to_end():
    betas = replace(SCHEDULE, beta_schedule="linear").betas
    assert (betas[0], betas[-1], len(betas)) == (0.0015, 0.0195, 1000)
    assert np.ptp(np.diff(betas)) < 1e-15


def test_sigma_is_noise_over_signal():
    alpha_cumprod = SCHEDULE.alpha_cumprod(321)
    assert SCHEDULE.sigma(321) == pytest.approx(math.sqrt(1 - alpha_cumprod) / math.sqrt(alpha_cumprod), rel=1e-12)


def test_sigma_is_interpolated_between_timesteps():
    assert SCHEDULE.sigma(10.25) == pytest.approx(0.75 * SCHEDULE.sigma(10) + 0.25 * SCHEDULE.sigma(11), rel=1e-12)


def test_sigma_stays_at_its_last_value_beyond_the_table():
    assert SCHEDULE.sigma(1000) == SCHEDULE.sigma(999)


def test_the_table_is_left_at_its_first_entry():
    assert SCHEDULE.alpha_cumprod(-19) == SCHEDULE.alpha_cumprod(0) < 1


def test_the_table_is_left_at_one_if_the_config_says_so():
    assert replace(SCHEDULE, set_alpha_to_one=True).alpha_cumprod(-19) == 1


@pytest.mark.parametrize("steps", [5, 10, 20, 25, 50, 100, 200])
def test_timesteps_equal_the_authors_where_steps_divides_the_table(golden, steps):
    assert SCHEDULE.timesteps(steps) == tuple(golden[f"ddim_schedule.{steps}.timesteps"].flip(0).tolist())


@pytest.mark.parametrize("steps", [3, 7, 150, 300])
def test_there_are_as_many_timesteps_as_steps_where_steps_does_not_divide_the_table(steps):
    assert len(SCHEDULE.timesteps(steps)) == steps


@pytest.mark.parametrize("steps", [1, 7, 20, 25, 200, 1000])
def test_trailing_begins_at_the_last_timestep_of_the_training_and_leading_earlier(steps):
    trailing = SCHEDULE.with_spacing("trailing")
    for spaced in (Schedule.timesteps, Schedule.interval_timesteps, Schedule.sigma_timesteps):
        assert spaced(trailing, steps)[0] == 999
        assert spaced(SCHEDULE, steps)[0] < 999 or steps == 1000


def test_another_spacing_keeps_the_noise_levels_and_none_keeps_everything():
    assert np.array_equal(SCHEDULE.with_spacing("trailing").sigmas, SCHEDULE.sigmas)
    assert SCHEDULE.with_spacing(None) is SCHEDULE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_number_of_steps_visits_as_many_different_timesteps_of_the_table(spacing, offset):
    schedule = replace(SCHEDULE, num_train_timesteps=60, timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 61):
        for visited in (schedule.timesteps(steps), schedule.interval_timesteps(steps)):
            assert len(set(visited)) == len(visited) == steps, steps
            assert sorted(visited, reverse=True) == list(visited), steps
            assert 0 <= visited[-1] <= visited[0] < 60, steps


def test_all_timesteps_are_visited_by_as_many_steps():
    assert SCHEDULE.timesteps(1000) == SCHEDULE.interval_timesteps(1000) == tuple(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1.5, 2.0, True, None, "10", math.nan])
def test_steps_must_be_a_whole_number_of_at_least_one(steps):
    with pytest.raises(ValueError, match=r"steps must be a positive integer, got "):
        SCHEDULE.timesteps(steps)


def test_steps_must_not_exceed_the_timesteps_of_the_training():
    with pytest.raises(ValueError, match="steps must be at most 1000, got 1001"):
        SCHEDULE.interval_timesteps(1001)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_timestep_that_a_sampler_visits_lies_within_the_whole_run(name):
    most = 50 if name == "lcm" else 1000
    for spacing in SPACINGS:
        schedule = Schedule.from_dict(PUBLISHED | {"timestep_spacing": spacing})
        assert all(schedule.within(t, (0, 1)) for steps in (1, 7, most) for t in timesteps(name, schedule, steps))


@pytest.mark.parametrize("border", [0, 0.1, 0.29, 1 / 3, 0.5, 0.7, 0.999, 1])
def test_each_timestep_lies_on_one_side_of_a_border_of_the_run(border):
    schedule = Schedule.from_dict(PUBLISHED)
    before = [schedule.within(t, (0, border)) for t in range(1000)]
    after = [schedule.within(t, (border, 1)) for t in range(1000)]
    assert [a + b for a, b in zip(before, after)] == [1] * 1000
    assert sum(before) == pytest.approx(1000 * border, abs=1)
    assert after == sorted(after, reverse=True)


def test_the_noise_levels_told_for_shares_of_the_run():
    told = {0.05: 53, 0.2: 15.4, 0.4: 4.5, 0.6: 1.8, 0.8: 0.79, 0.95: 0.30}
    schedule = Schedule.from_dict(PUBLISHED)
    for share, sigma in told.items():
        assert schedule.sigma(1000 * (1 - share)) == pytest.approx(sigma, rel=0.02)


def test_numpy_integers_are_steps():
    assert SCHEDULE.timesteps(np.int64(10)) == SCHEDULE.timesteps(10)


def test_from_json_reads_the_published_file(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(PUBLISHED))
    assert Schedule.from_json(path) == Schedule(
        num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear",
        prediction_type="epsilon", timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
    )


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
                                  "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
                                  "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_files_saved_by_any_scheduler_class_are_read(name, tmp_path):
    cls = getattr(diffusers, name)
    cls.from_config(diffusers.DDIMScheduler.from_config(PUBLISHED).config).save_pretrained(tmp_path)
    schedule = Schedule.from_json(tmp_path / "scheduler_config.json")
    assert replace(schedule, set_alpha_to_one=False) == SCHEDULE


def test_fields_left_out_have_the_defaults_of_the_class():
    short = {field: PUBLISHED[field] for field in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}
    assert Schedule.from_dict(short | {"_class_name": "PNDMScheduler"}) == replace(SCHEDULE, steps_offset=0)
    assert Schedule.from_dict(short | {"_class_name": "LMSDiscreteScheduler"}).timestep_spacing == "linspace"
    ddim, pndm = (Schedule.from_dict(short | {"_class_name": name}) for name in ("DDIMScheduler", "PNDMScheduler"))
    assert ddim.options("DDIMScheduler").clip_sample and not pndm.options("DDIMScheduler").clip_sample
    assert ddim.options("PNDMScheduler").skip_prk_steps and not pndm.options("PNDMScheduler").skip_prk_steps


@pytest.mark.parametrize("field, value", [
    ("num_train_timesteps", 0), ("num_train_timesteps", 10.5), ("beta_start", 0), ("beta_end", 1.5),
    ("beta_end", "0.02"), ("beta_start", math.nan), ("beta_schedule", "sigmoid"), ("prediction_type", "flow"),
    ("timestep_spacing", "karras"), ("steps_offset", -1), ("set_alpha_to_one", "no"), ("clip_sample", "yes"),
    ("thresholding", 1), ("trained_betas", [0.1, 0.2]), ("trained_betas", 0.1), ("trained_betas", "x"),
    ("rescale_betas_zero_snr", True), ("clip_sample_range", 0), ("dynamic_thresholding_ratio", 1.5),
    ("sample_max_value", math.nan),
])
def test_values_that_are_not_implemented_name_file_and_field(field, value, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config(**{field: value})))
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: {field} must be .*, got ") as raised:
        Schedule.from_json(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule"])
def test_missing_fields_name_file_and_field(field):
    with pytest.raises(ValueError, match=rf"^some file: {field} is missing$"):
        Schedule.from_dict({key: value for key, value in PUBLISHED.items() if key != field}, source="some file")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_files_that_hold_no_json_object_name_the_file(text, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: "):
        Schedule.from_json(path)
