"""`ldm2 train` as a command on the bundled model: results, resuming, several processes, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from ldm2.checkpoints import lora_files
from ldm2.cli.commands import main
from ldm2.training import loop, tuning
from ldm2.training.objective import add_noise
from ldm2.training.options import FINETUNE, LORA, Training
from ldm2.training.tiny.sounds import sounds
from ldm2.weights import read_safetensors
from tests.helpers import PACKAGES
from tests.training.runs import killed, losses

LORA_FILE, STATE = "pytorch_lora_weights.safetensors", "training/lora.pt"
SHORT = ("--seconds", "0.64", "--rank", "2", "--batch-size", "2", "--warmup", "1", "--model", "tiny", "-q")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips in a folder, at two rates, one in stereo."""
    folder = tmp_path_factory.mktemp("clips")
    for number, sound in enumerate(sounds(3, 4, num_samples=16_000)):
        wave = np.stack([sound.waveform, 0.5 * sound.waveform], axis=1) if number == 1 else sound.waveform
        soundfile.write(folder / f"{number}.wav", wave, 22_050 if number == 2 else 16_000)
        (folder / f"{number}.txt").write_text(sound.caption)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(clips, cache, tmp_path):
    """Trains and returns OUT."""
    def run(*words, task="lora", out="out", code=0, data=clips):
        arguments = ["train", task, str(data), "-o", str(tmp_path / out), "--cache", str(cache), *SHORT, *words]
        if task == "finetune":
            arguments = [word for word in arguments if word not in ("--rank",)]
            arguments.remove("2")
        assert main(arguments) == code
        return tmp_path / out
    return run


@pytest.fixture(scope="module")
def six(cache):
    """Six steps, some rows of which keep what the model did."""
    (cache / "keep.txt").write_text("wind\n")
    return ["--steps", "6", "--keep", str(cache / "keep.txt")]


@pytest.fixture(scope="module")
def undisturbed(clips, cache, six, tmp_path_factory):
    """OUT of a training of six steps."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(["train", "lora", str(clips), "-o", str(out), "--cache", str(cache), *SHORT, *six]) == 0
    return out


def test_a_lora_is_trained_and_fits_its_model(run, capsys):
    out = run("--steps", "3", "--rate", "0.01")
    assert f"--lora {out}" in capsys.readouterr().out
    tensors = read_safetensors(out / LORA_FILE)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert len(losses(out)) == 3
    assert lora_files.read(out / LORA_FILE).fitted("unet", dict(ldm2.load("tiny").unet.named_parameters()))


def test_a_fine_tuned_model_is_a_checkpoint_for_diffusers_too(run):
    from diffusers import AudioLDM2UNet2DConditionModel

    out = run("--steps", "2", "--rate", "0.001", "--average", "0", task="finetune")
    before = ldm2.load("tiny").unet.conv_in.weight
    assert not torch.equal(ldm2.load(str(out)).unet.conv_in.weight, before)
    found = AudioLDM2UNet2DConditionModel.from_pretrained(out / "unet")
    assert torch.equal(found.conv_in.weight.float(), ldm2.load(str(out)).unet.conv_in.weight)
    assert read_safetensors(out / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16


def test_a_training_that_was_killed_ends_as_one_that_was_not(run, undisturbed, six, clips, cache, tmp_path):
    out = tmp_path / "killed"
    words = ["train", "lora", str(clips), "-o", str(out), "--cache", str(cache), *SHORT, *six, "--save-minutes", "0"]
    assert 0 < killed(words, out / STATE) < 6
    assert not (out / LORA_FILE).exists()
    run(*six, "--save-minutes", "0", out="killed")
    assert losses(out) == losses(undisturbed)
    before, after = (read_safetensors(folder / LORA_FILE) for folder in (undisturbed, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ctrl_c_saves_and_the_same_command_goes_on(run, undisturbed, six, monkeypatch, capsys):
    optimise = loop._Run.optimise

    def interrupted(self, loss):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return optimise(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "optimise", interrupted)
        out = run(*six, code=130)
    assert "SIGINT after step 4; all is saved" in capsys.readouterr().err
    run(*six)
    assert losses(out) == losses(undisturbed)


def test_a_full_disk_costs_no_step_and_leaves_the_last_save(run, monkeypatch, caplog, capsys):
    out = run("--steps", "2", "--save-minutes", "0")
    state = (out / STATE).read_bytes()
    monkeypatch.setattr(torch, "save", lambda fields, file: file.write(b"x") and no_room())
    run("--steps", "3", "--save-minutes", "0", "--overwrite", code=2, out="other")
    assert caplog.text.count("the training goes on") == 2
    assert "No space left" in capsys.readouterr().err
    assert len(losses(out.parent / "other")) == 3
    assert not (out.parent / "other" / STATE).exists()
    assert (out / STATE).read_bytes() == state


def no_room():
    raise OSError(28, "No space left on device")


def test_too_little_room_is_told_before(run, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    run("--steps", "1", code=2)
    assert "0.00 GB are free" in capsys.readouterr().err


def test_a_dry_run_measures_and_writes_nothing(run, capsys):
    out = run("--steps", "100", "--dry-run")
    said = capsys.readouterr().out
    assert "GB at the peak" in said and "s a step" in said and "for 100 steps" in said
    assert not out.exists()


def test_the_held_out_loss_stops_the_training(run):
    out = run("--steps", "50", "--rate", "1", "--held-out", "0.25", "--patience", "1", "--every", "1")
    lines = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    measured = [line["held_out"] for line in lines if "held_out" in line]
    assert len(measured) < 50 and measured[-1] >= min(measured[:-1])


def test_previews_and_tensorboard(run):
    out = run("--steps", "2", "--every", "2", "--preview", "a siren")
    assert [path.name for path in (out / "training/previews").iterdir()] == ["step-000002-1.wav"]
    pytest.importorskip("tensorboard")
    assert list((out / "training/tensorboard").iterdir())


def test_sounds_to_keep_are_made_once_and_learned_along(run, cache, tmp_path):
    (tmp_path / "keep.txt").write_text("wind\n")
    out = run("--steps", "1", "--keep", str(tmp_path / "keep.txt"))
    (key,) = json.loads((out / "training/job.json").read_text())["data"][4:]
    (latents,) = cache.rglob(f"{key}.safetensors")
    made = ldm2.generate("wind", model="tiny", seed=0, seconds=0.64).latents[0]
    torch.testing.assert_close(read_safetensors(latents)["mean"] * ldm2.load("tiny").vae.config.scaling_factor, made)
    stamp = latents.stat().st_mtime_ns
    run("--steps", "1", "--keep", str(tmp_path / "keep.txt"), out="again")
    assert latents.stat().st_mtime_ns == stamp


def test_a_model_in_float32_takes_conditionings_of_one_in_half_precision():
    pipe = ldm2.load("tiny")
    learner = tuning.Learner(pipe, Training(LORA).resolved(), torch.float32)
    x, conditioning = tuning.noise_for(pipe, 16, 2)
    t = torch.tensor([10, 500])
    found = learner.predict(pipe.unet, x, t, conditioning.to(dtype=torch.float16))
    torch.testing.assert_close(found, pipe.unet(x, t, conditioning), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("task", [LORA, FINETUNE])
def test_kept_rows_are_to_be_predicted_as_before_the_training(task):
    pipe, untouched = ldm2.load("tiny"), ldm2.load("tiny").unet
    learner = tuning.Learner(pipe, Training(task, keep="keep.txt", keep_share=0.5).resolved(), torch.float32)
    batch = learner.example(*tuning.noise_for(pipe, 16, 4))
    assert batch.kept.tolist() == [True, True, False, False]
    trained = learner.prepare()
    assert learner.error(batch)[:2].max() < 1e-12 < learner.error(batch)[2:].min()
    with torch.no_grad():
        for number, parameter in enumerate(trained.module.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        a = torch.as_tensor(pipe.schedule.alphas_cumprod)[batch.t].float()
        x_t = add_noise(batch.x_0, batch.eps, a)
        before, now = (unet(x_t, batch.t, batch.conditioning) for unet in (untouched, pipe.unet))
        wanted = torch.cat([before[:2], batch.eps[2:]])
        snr = a / (1 - a)
        expected = ((now - wanted) ** 2).mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr
        torch.testing.assert_close(learner.error(batch), expected, rtol=1e-4, atol=1e-6)


def test_a_changed_sound_is_encoded_again_and_an_equal_one_is_not(run, clips, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in clips.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    out = run("--steps", "1", data=data)
    told = json.loads((out / "training/job.json").read_text())["data"]
    assert told == json.loads((run("--steps", "1", out="same") / "training/job.json").read_text())["data"]
    stamp = (data / "0.wav").stat()
    soundfile.write(data / "0.wav", 0.5 * soundfile.read(data / "0.wav")[0], 16_000)
    os.utime(data / "0.wav", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run("--steps", "1", data=data, code=2)
    assert "another data" in capsys.readouterr().err
    run("--steps", "1", "--overwrite", data=data)
    now = json.loads((out / "training/job.json").read_text())["data"]
    assert [a == b for a, b in zip(told, now)] == [False, True, True, True]


def test_where_no_sound_can_be_read_the_first_one_is_named(run, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.wav").write_bytes(b"no sound")
    (data / "x.txt").write_text("a bell")
    run("--steps", "1", data=data, code=2)
    assert "none of 1 clips can be read" in (told := capsys.readouterr().err) and "x.wav cannot be read" in told


def test_a_broken_sound_is_named_and_left_out(run, clips, tmp_path, caplog, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in clips.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "2.wav").write_bytes(b"RIFF")
    (data / "x.wav").write_bytes(b"")
    run("--steps", "1", data=data)
    assert "2.wav" in caplog.text and "2 sounds are left out" in caplog.text
    run("--steps", "1", "--strict", data=data, code=2, out="strict")
    assert "x.txt is missing" in capsys.readouterr().err
    (data / "x.wav").unlink()
    run("--steps", "1", "--strict", data=data, code=2, out="strict")
    assert "2.wav" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (("--batch-size", "5"), "number of clips to train on, which is 4, got 5"),
    (("--held-out", "0.9"), "which is 0, got 2"),
])
def test_impossible_trainings_are_one_line(run, capsys, words, said):
    run("--steps", "1", *words, code=2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    run("--steps", "1", "--overwrite", code=2)
    assert "no training made it" in capsys.readouterr().err
    assert (tmp_path / "out/precious").read_text() == "x"


def test_another_training_does_not_go_on(undisturbed, clips, cache, capsys):
    words = ["train", "lora", str(clips), "-o", str(undisturbed), "--cache", str(cache), *SHORT, "--steps", "2"]
    assert main(words) == 2
    assert "steps 6 instead of 2" in capsys.readouterr().err


def test_accumulated_batches_have_the_gradients_of_one_that_is_larger(clips, cache):
    def gradient(**options):
        pipe = ldm2.load("tiny")
        job = tuning.Job(clips, "", Training(LORA, rank=2, seconds=0.64, **options).resolved())
        return step_gradient(pipe, job, cache)

    for a, b in zip(gradient(batch_size=4), gradient(batch_size=2, accumulate=2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def step_gradient(pipe, job, cache):
    """The gradients of the first step."""
    from ldm2.training import data
    from ldm2.training.batches import Batches
    from ldm2.training.encoding import Store, encode

    frames = tuning.frames_of(pipe, job.options)
    store = Store(cache)
    examples = encode(pipe, "tiny", data.read(job.data), frames, store, True, lambda *_: None)
    learner = tuning.Learner(pipe, job.options, torch.float32)
    trained = learner.prepare()
    for parameter in trained.module.parameters():           # the up matrices begin at zero, where nothing flows down
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    batches = Batches(examples.all, examples.nothing, store, rows=4, frames=frames, scaling=1.0, total=1000, drop=0.1,
                      seed=0)
    for part in learner.losses(batches, 0):
        part.backward()
    return [parameter.grad for parameter in trained.module.parameters()]


def test_checkpointing_changes_memory_and_not_gradients(clips, cache):
    pipes = ldm2.load("tiny"), ldm2.load("tiny")
    found = [step_gradient(pipe, tuning.Job(clips, "", Training(LORA, rank=2, seconds=0.64, checkpointing=on)
                                            .resolved()), cache) for pipe, on in zip(pipes, (False, True))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_torchrun_trains_as_one_process_with_twice_the_batch(run, clips, cache, tmp_path):
    one = run("--steps", "2", "--batch-size", "4", out="one")
    words = ["train", "lora", str(clips), "-o", str(tmp_path / "two"), "--cache", str(cache), *SHORT, "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": PACKAGES, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ldm2", *words],
                   env=environment, check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    before, after = (read_safetensors(folder / LORA_FILE) for folder in (one, tmp_path / "two"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-2, atol=1e-4)
