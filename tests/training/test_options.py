"""The description of a training."""

import pytest

from ldm2.training.options import DISTILL, FINETUNE, LAYERS_OF_UNET, LORA, Training, difference


def test_what_is_not_given_takes_the_default_of_the_task():
    lora, full = Training(LORA).resolved(), Training(FINETUNE).resolved()
    assert (lora.rank, lora.alpha, lora.layers, lora.average) == (16, 16.0, ("attention",), None)
    assert (full.rank, full.average, full.steps) == (None, 0.9999, 10_000)


@pytest.mark.parametrize(("options", "rule"), [
    ({"steps": 0}, "steps.*positive.*0"),
    ({"rate": 0}, "rate.*above 0.*0"),
    ({"drop": 1.5}, "drop.*0 to 1.*1.5"),
    ({"rank": 2.5}, "rank.*integer.*2.5"),
    ({"layers": ("attention", "ears")}, "layers.*attention.*ears"),
    ({"preview": [""]}, "preview.*empty"),
    ({"dtype": "float16"}, "dtype.*float16.*bfloat16"),
    ({"average": 0.9}, "train lora has no option 'average'"),
    ({"stepps": 1}, "stepps.*did you mean steps"),
])
def test_options_that_make_no_sense(options, rule):
    with pytest.raises(ValueError, match=rule):
        Training.create(LORA, **options)


@pytest.mark.parametrize(("evaluations", "steps"), [(1, 24), (4, 24), (5, 25), (7, 28), (30, 30)])
def test_the_steps_of_a_teacher_are_a_multiple_of_the_students(evaluations, steps):
    assert Training(DISTILL, evaluations=evaluations).resolved().teacher_steps == steps


def test_a_student_has_no_projection_of_its_own():
    with pytest.raises(ValueError, match=r"layers of distill are of the UNet.*'projection'"):
        Training(DISTILL, layers=("attention", "projection")).resolved()


def test_a_student_is_a_lora_or_all_of_it():
    student, whole = Training(DISTILL).resolved(), Training(DISTILL, full=True).resolved()
    assert (student.low_rank, student.alpha, student.layers) == (True, 16.0, LAYERS_OF_UNET) and not whole.low_rank


def test_patience_needs_clips_to_measure_on():
    with pytest.raises(ValueError, match="patience 3 needs held_out"):
        Training(LORA, patience=3).resolved()


def test_a_training_goes_on_with_equal_options_and_other_previews():
    before = Training(LORA, seed=1).resolved().plain()
    assert difference(before, Training(LORA, seed=1, preview="a dog").resolved().plain()) is None
    assert difference(before, Training(LORA, seed=2).resolved().plain()) == "seed 1 instead of 2"
