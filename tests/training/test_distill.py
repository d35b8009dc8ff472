"""`ldm2 train distill` on the bundled model: what the teacher leaves, what the student learns, resuming, results."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import soundfile
import torch

import ldm2
from ldm2.checkpoints import lora_files
from ldm2.cli.commands import main
from ldm2.conditioning import Conditioning
from ldm2.guidance import guide
from ldm2.noise import SeededNoise
from ldm2.schedules import Schedule
from ldm2.settings import Sampling
from ldm2.stages import Init
from ldm2.training import captions, teacher
from ldm2.training.distill import Batches, Cuts, Ode, Student, ddim_step, sampling_of
from ldm2.training.encoding import Store
from ldm2.training.options import DISTILL, Training
from ldm2.weights import read_safetensors
from tests.helpers import PUBLISHED
from tests.training.runs import killed, losses

ROOT = Path(__file__).parents[2]
LORA_FILE, STATE = "pytorch_lora_weights.safetensors", "training/distill.pt"
OPTIONS = {"seconds": 0.64, "runs": 12, "teacher_steps": 4, "evaluations": 2, "batch_size": 2, "warmup": 1}
SIX = ["--rank", "2", "--steps", "6", "--own-states", "0.5"]
SHORT = [*(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()), "--model", "tiny", "-q"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file of captions, and a folder for what is computed once."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "captions.txt").write_text("a siren\n\nwhite noise\na siren\na low tone\n")
    return folder


@pytest.fixture
def run(place, tmp_path):
    """Distills and returns OUT."""
    def run(*words, out="out", code=0, data=place / "captions.txt", cache=True):
        kept = ["--cache", str(place / "cache")] if cache else []
        assert main(["train", "distill", str(data), "-o", str(tmp_path / out), *kept, *SHORT, *words]) == code
        return tmp_path / out
    return run


@pytest.fixture(scope="module")
def undisturbed(place):
    """OUT of a training of six steps."""
    out, words = place / "undisturbed", ["--cache", str(place / "cache"), *SHORT, *SIX]
    assert main(["train", "distill", str(place / "captions.txt"), "-o", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def pipe():
    return ldm2.load("tiny")


@pytest.fixture(scope="module")
def runs(pipe, place):
    """The teacher, and what it has made about the captions."""
    options = Training(DISTILL, **OPTIONS, guidance_scale=2.0).resolved()
    made = teacher.Teacher(pipe, "digest", options, 16, Store(place / "runs"))
    return made, made.prepare(place / "captions.txt", lambda *_: None)


# ---------------------------------------------------------------------------------------------------------- the steps

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_students_step_is_that_of_ddim(kind):
    fields = PUBLISHED | {"timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = diffusers.DDIMScheduler.from_config(fields)
    scheduler.set_timesteps(4)
    cuts = Cuts.of(Schedule.from_dict(PUBLISHED), 4)
    assert list(cuts.timesteps) == scheduler.timesteps.tolist() == [999, 749, 499, 249]
    x, prediction = torch.randn(2, 1, 4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        a, a_next = torch.tensor(cuts.alphas_cumprod, dtype=torch.float64)[[i, i + 1]]
        wanted = scheduler.step(prediction, t, x).prev_sample
        torch.testing.assert_close(ddim_step(kind, x, prediction, a[None], a_next[None]), wanted, rtol=1e-5, atol=1e-5)


def test_a_run_holds_the_states_of_the_teacher_at_the_cuts(runs, pipe):
    made, found = runs
    group = found.groups[0]
    states = made.store.get(group.key)["states"]
    assert states.shape == (8, 3, *pipe.latent_shape(0.64)) and group.first == 0
    noise = SeededNoise(range(teacher._SEEDS, teacher._SEEDS + 8)).draw(*pipe.latent_shape(0.64))
    torch.testing.assert_close(states[:, 0], noise.half())
    texts = [made._chosen([teacher.Subject(text) for text in ("a siren", "white noise", "a low tone")])[i].caption
             for i in range(8)]
    sides = pipe.encode(texts)
    whole = pipe.denoise(sides, pipe.encode_unconditional(sides), noise, Sampling(
        sampler="dpmpp-2m", steps=4, spacing="trailing", guidance_scale=2.0))
    assert (states[:, -1].float() - whole).abs().max() < 5e-3


def test_every_segment_of_every_run_is_drawn_once_in_an_epoch(runs):
    made, found = runs
    batches = Batches(found.groups, made.store, rows=6, evaluations=2, seed=0)
    assert len(batches) == 12 * 2
    drawn = [batches.take(step, first, 3) for step in range(4) for first in (0, 3)]
    states = torch.cat([part.x for part in drawn])
    assert len(states.flatten(1).unique(dim=0)) == 24
    assert torch.equal(torch.cat([part.index for part in drawn]).bincount(), torch.tensor([12, 12]))
    assert torch.equal(batches.take(1, 0, 3).x, drawn[2].x)


def test_the_error_of_a_student_that_goes_where_the_teacher_went_is_zero(runs, pipe, monkeypatch):
    made, found = runs
    batch = Batches(found.groups, made.store, rows=4, evaluations=2, seed=0).take(0, 0, 4)
    student = Student(pipe, made.options, torch.float32)
    a, a_next = (torch.tensor(student.cuts.alphas_cumprod)[i][:, None, None, None] for i in
                 (batch.index, batch.index + 1))

    def knowing(x, t, conditioning):                       # a x_next = a_next x + (...) eps, solved for eps
        assert t.tolist() == [[999, 499][i] for i in batch.index]
        ratio = (a_next / a).sqrt()
        return (batch.x_next - ratio * x) / ((1 - a_next).sqrt() - ratio * (1 - a).sqrt())

    monkeypatch.setattr(student, "unet", knowing)
    assert student.error(batch).max() < 1e-6


@pytest.mark.parametrize(("scale", "first"), [(2.0, 0), (1.0, 0), (2.0, 3)])
@torch.inference_mode()
def test_the_teachers_path_is_that_of_the_sampler(pipe, scale, first):
    sides = pipe.encode(["a siren", "white noise"])
    nothing = pipe.encode_unconditional(sides)
    noise, both = SeededNoise(range(2)).draw(*pipe.latent_shape(0.64)), Conditioning.join([nothing, sides])
    sampling = Sampling(sampler="dpmpp-2m", steps=6, spacing="trailing", guidance_scale=scale)
    x_0 = torch.full_like(noise, 0.5)
    ode = Ode(pipe.schedule, 6)
    a = ode.alphas_cumprod[first]
    begin = noise if first == 0 else a.sqrt() * x_0 + (1 - a).sqrt() * noise

    def predict(x, t):
        if scale <= 1:
            return pipe.unet(x, t, sides)
        return guide(pipe.unet(torch.cat([x, x]), torch.cat([t, t]), both), scale)

    whole = pipe.denoise(sides, nothing, noise, sampling, init=Init(x_0 if first else None, first))
    found = ode.follow(predict, begin, torch.tensor([first, first]), 6 - first)
    assert (found - whole).abs().max() < 1e-4


def test_rows_at_different_places_of_the_path_do_not_meet(pipe):
    ode = Ode(pipe.schedule, 6)
    x = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return torch.tanh(x + t[:, None, None, None] / 1000)

    together = ode.follow(predict, x, torch.tensor([1, 4]), 2)
    for row, place in enumerate((1, 4)):
        alone = ode.follow(predict, x[row : row + 1], torch.tensor([place]), 2)
        torch.testing.assert_close(together[row : row + 1], alone)


def test_own_states_are_the_students_and_the_teacher_goes_on_from_there(runs, pipe):
    made, found = runs
    batches = Batches(found.groups, made.store, rows=12, evaluations=2, seed=0, own_states=1.0)
    batch = batches.take(0, 0, 12)
    assert torch.equal(batch.first, torch.zeros(12).long()) and set(batch.index.tolist()) == {0, 1}
    options = Training(DISTILL, **OPTIONS, guidance_scale=2.0, own_states=1.0, rank=2).resolved()
    student = Student(ldm2.load("tiny"), options, torch.float32)
    student.prepare()
    late = batch.index.nonzero()[:, 0].tolist()
    with torch.no_grad():
        error = student.error(batch)
        sides, nothing = batch.conditioning.select(late), batch.unconditional.select(late)
        states = []                                        # the LoRA is zero yet: two steps of the model itself
        pipe.denoise(sides, None, batch.x[late], Sampling(**sampling_of(2)),
                     callback=lambda done, total, x: states.append(x.clone()))
        both = Conditioning.join([nothing, sides])
        wanted = Ode(pipe.schedule, 4).follow(
            lambda x, t: guide(pipe.unet(torch.cat([x, x]), torch.cat([t, t]), both), 2.0), states[0],
            torch.full((len(late),), 2), 2)
    torch.testing.assert_close(error[late], ((states[1] - wanted) ** 2).mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_own_states_come_as_often_as_asked(runs):
    made, found = runs
    batch = Batches(found.groups, made.store, rows=400, evaluations=2, seed=0, own_states=0.25).take(0, 0, 400)
    late = batch.index == 1
    assert (batch.first < batch.index)[late].float().mean() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(batch.first[~late], batch.index[~late])


# -------------------------------------------------------------------------------------------------------- the command

def test_a_student_is_a_lora_that_is_sampled_without_guidance(undisturbed, capsys):
    adapter = lora_files.read(undisturbed / LORA_FILE)
    pipe = ldm2.load("tiny")
    assert adapter.fitted("unet", dict(pipe.unet.named_parameters()))
    assert any(layer.up.abs().max() > 0 for layer in adapter.layers.values())
    made = pipe.generate("a siren", seed=1, seconds=0.64, lora=str(undisturbed), **sampling_of(2))
    plain = pipe.generate("a siren", seed=1, seconds=0.64, **sampling_of(2))
    assert np.isfinite(made.waveforms).all() and not np.array_equal(made.waveforms, plain.waveforms)


def test_the_loss_falls(run):
    found = losses(run("--rank", "16", "--steps", "12", "--rate", "0.01", "--seed", "3"))
    assert np.mean(found[-4:]) < 0.9 * np.mean(found[:4])


def test_a_distillation_that_was_killed_ends_as_one_that_was_not(run, undisturbed, place, tmp_path):
    out = tmp_path / "killed"
    words = ["train", "distill", str(place / "captions.txt"), "-o", str(out), "--cache", str(place / "cache"), *SHORT,
             *SIX, "--save-minutes", "0"]
    assert 0 < killed(words, out / STATE) < 6
    run(*SIX, "--save-minutes", "0", out="killed")
    assert losses(out) == losses(undisturbed)
    before, after = (read_safetensors(folder / LORA_FILE) for folder in (undisturbed, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_teachers_runs_are_made_once(run, undisturbed, monkeypatch):
    monkeypatch.setattr(teacher.Teacher, "_run", lambda *_: pytest.fail("a run was made again"))
    run("--rank", "2", "--steps", "1")


def test_a_whole_unet_is_a_checkpoint_that_is_sampled_as_a_student(run):
    out = run("--full", "--steps", "1", "--rate", "0.001")
    told = ldm2.load(str(out)).generate("a siren", seed=1, seconds=0.64).settings
    assert {name: told[name] for name in sampling_of(2)} == sampling_of(2)
    assert not torch.equal(ldm2.load(str(out)).unet.conv_in.weight, ldm2.load("tiny").unet.conv_in.weight)


def test_runs_about_sounds_begin_in_turn_at_all_evaluations(pipe, tmp_path):
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * np.random.default_rng(number).standard_normal(12_000), 16_000)
        (tmp_path / f"{number}.txt").write_text("white noise")
    options = Training(DISTILL, **OPTIONS).resolved()
    made = teacher.Teacher(pipe, "digest", options, 16, Store(tmp_path / "runs"))
    groups = made.prepare(tmp_path, lambda *_: None).groups
    assert [group.first for group in groups] == [0, 1]
    states = made.store.get(groups[1].key)["states"]
    assert states.shape[:2] == (4, 2)
    with torch.inference_mode():                           # the sound in the noise of its first state
        mean = pipe.posterior(soundfile.read(tmp_path / "0.wav", dtype="float32")[0], 16_000).mean
    x_0 = mean[0, :, :16] * pipe.vae.config.scaling_factor
    share = [float((states[:, 0].float() * x_0).sum(dim=(1, 2, 3))[i] / x_0.square().sum()) for i in range(4)]
    alpha = Cuts.of(pipe.schedule, 2).alphas_cumprod[1] ** 0.5
    assert max(share) == pytest.approx(alpha, abs=0.2)


@pytest.mark.parametrize(("content", "said"), [
    (None, "captions.txt is missing"), ("\n \n", "captions.txt holds no caption"), (b"\xff\xfe\x00x", "captions.txt: "),
])
def test_captions_that_make_no_sense(run, tmp_path, capsys, content, said):
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run("--steps", "1", data=path, code=2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--teacher-steps", "5"], "teacher_steps must be a multiple of evaluations (2), got 5"),
    (["--held-out", "0.9"], "held_out 0.9 leaves no runs"),
])
def test_options_that_do_not_go_together(run, capsys, words, said):
    run(*words, "--steps", "1", code=2)
    assert said in capsys.readouterr().err


def test_too_little_room_for_the_runs_is_told_before(run, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    monkeypatch.setattr(teacher.Teacher, "_run", lambda *_: pytest.fail("a run was made"))
    run("--steps", "1", code=2, cache=False)
    assert "0.00 GB are free" in capsys.readouterr().err


def test_a_dry_run_measures_teacher_and_student_and_writes_nothing(run, capsys):
    out = run("--dry-run", "--rank", "2")
    said = capsys.readouterr().out
    assert "s an evaluation" in said and "for 12 runs" in said and "s a step" in said and not out.exists()


def test_common_captions_are_many_and_all_different():
    found = captions.common()
    assert len(found) == len(set(found)) > 500 and all(text == text.strip() and "{}" not in text for text in found)
