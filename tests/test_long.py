"""Sounds beyond the model's own length, prompts over time and loops, on a tiny random checkpoint.

Its own length is 1.28 s, that is 32 latent frames of 640 samples.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from benchmarks.long_sound import joint_ranks, measure, table
from ldm2.cli.commands import main
from ldm2.settings import Sampling
from ldm2.windows import plan

PROMPT, OTHER = "a dog barking in the rain", "techno music with a strong beat"


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    """ldm2 on the tiny checkpoint."""
    return ldm2.load(tiny_checkpoint)


def generate(pipe, prompt=PROMPT, **settings):
    """Short, in windows of 8 latent frames, without guidance."""
    short = {"seconds": 1.6, "steps": 2, "guidance_scale": 1, "seed": 3, "window": 0.32}
    return pipe.generate(prompt, **short | settings)


def largest_inputs(pipe, run) -> dict[str, int]:
    """Frames that the UNet, the VAE's decoder and the vocoder see at once while `run()` runs."""
    seen: dict[str, int] = {}
    handles = []
    parts = {"unet": pipe.unet.conv_in, "vae": pipe.vae.decoder, "vocoder": pipe.vocoder}
    for name, part in parts.items():
        def watch(module, inputs, name=name):
            seen[name] = max(seen.get(name, 0), inputs[0].shape[2])
        handles.append(part.register_forward_pre_hook(watch))
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_the_checkpoint_tells_its_own_length(pipe):
    assert pipe.native_latent_frames == 32
    assert pipe.windows(32) is None
    assert len(pipe.windows(33)) == 2


@pytest.mark.parametrize("seconds", [1.3, 2.0, 3.21])
def test_a_sound_beyond_the_own_length_has_the_asked_samples(pipe, seconds):
    result = pipe.generate(PROMPT, seconds=seconds, steps=1, seed=0)
    assert result.waveforms.shape == (1, round(16000 * seconds))
    assert np.isfinite(result.waveforms).all()


def test_what_the_models_see_at_once_does_not_grow_with_the_length(pipe):
    sizes = []
    for seconds in (24, 36):
        latents = torch.zeros(1, 4, 25 * seconds, 8)
        sizes.append(largest_inputs(pipe, lambda s=seconds: generate(pipe, seconds=s / 4, steps=1))
                     | largest_inputs(pipe, lambda x=latents: pipe.vocode(pipe.decode(x))))
    assert sizes[0] == sizes[1] == {"unet": 8, "vae": 256, "vocoder": 512 + 20}


def test_looped_pieces_are_of_the_same_size(pipe):
    sizes = largest_inputs(pipe, lambda: pipe.vocode(pipe.decode(torch.zeros(1, 4, 300, 8), loop=True), loop=True))
    assert sizes == {"vae": 256, "vocoder": 512 + 20}


@pytest.mark.parametrize("window", [1.28, 5.0])
def test_a_window_that_holds_the_whole_sound_changes_nothing(pipe, window):
    plain, windowed = (generate(pipe, seconds=1.2, window=w) for w in (None, window))
    assert np.array_equal(plain.waveforms, windowed.waveforms)


def test_windows_see_only_their_surroundings(pipe):
    latents = torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, :, -1] += 1
    a, b = (generate(pipe, steps=1, latents=x).latents for x in (latents, changed))
    assert torch.equal(a[:, :, :32], b[:, :, :32])
    assert not torch.equal(a[:, :, -8:], b[:, :, -8:])


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m-sde", "pndm"])
def test_any_sampler_works_on_windows(pipe, sampler):
    result = generate(pipe, sampler=sampler, seconds=0.8)
    assert np.isfinite(result.waveforms).all() and result.waveforms.std() > 0


def test_a_long_row_does_not_depend_on_its_batch(pipe):
    together = generate(pipe, [PROMPT, OTHER], prompt_at=[(0.8, "rain")], guidance_scale=3)
    alone = generate(pipe, OTHER, seed=4, prompt_at=[(0.8, "rain")], guidance_scale=3)
    assert torch.allclose(together.latents[1:], alone.latents, atol=1e-4)


def test_guidance_works_inside_each_window(pipe):
    weak, strong = (generate(pipe, guidance_scale=scale).latents for scale in (1, 4))
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_each_prompt_rules_its_own_time(pipe):
    first, second = (generate(pipe, prompt, steps=1).latents for prompt in (PROMPT, OTHER))
    both = generate(pipe, PROMPT, steps=1, prompt_at=[(0.8, OTHER)]).latents
    assert torch.allclose(both[:, :, :19], first[:, :, :19], atol=1e-5)
    assert torch.allclose(both[:, :, 21:], second[:, :, 21:], atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)


def test_prompts_may_change_within_one_window(pipe):
    first, both = (generate(pipe, seconds=0.32, prompt_at=changes).latents for changes in ([], [(0.16, OTHER)]))
    assert not torch.equal(first, both)


def test_settings_make_a_long_sound_again(pipe):
    first = generate(pipe, loop=True, overlap=0.12, prompt_at=[(0.7, OTHER)])
    settings = json.loads(json.dumps(first.settings))
    names = ("prompt", "seconds", "steps", "guidance_scale", "seed", "window", "overlap", "loop", "prompt_at")
    again = pipe.generate(**{name: settings[name] for name in names})
    assert np.array_equal(first.waveforms, again.waveforms)


@pytest.mark.parametrize("asked, made", [(0.5, 0.48), (0.51, 0.52), (0.001, 0.04), (2.0, 2.0)])
def test_a_loop_is_a_whole_number_of_latent_frames(pipe, asked, made):
    result = generate(pipe, loop=True, seconds=asked, steps=1)
    assert result.settings["seconds"] == made
    assert result.waveforms.shape == (1, round(16000 * made))


@pytest.mark.parametrize("num_frames, stride", [(96, 48), (24, 12)])
def test_rolling_the_noise_of_a_loop_rolls_the_sound(pipe, num_frames, stride):
    noise = torch.randn(1, 4, num_frames, 8, generator=torch.Generator().manual_seed(0))
    settings = {"seconds": num_frames * 0.04, "loop": True, "window": None}
    sound, rolled = (
        generate(pipe, latents=x, **settings).waveforms for x in (noise, noise.roll(stride, 2))
    )
    assert np.abs(rolled - np.roll(sound, 640 * stride, axis=1)).max() < 1e-4


def test_the_joint_of_a_loop_is_like_any_other_place(pipe):
    ranks = []
    for seed in range(6):
        (waveform,) = generate(pipe, loop=True, seconds=0.96, seed=seed).waveforms
        ranks.append(joint_ranks(waveform, 16000))
    for name in ranks[0]:
        assert np.mean([rank[name] for rank in ranks]) < 0.8, name           # 0.5 on average, 0.12 standard deviation


def test_the_judge_of_joints_hears_a_cut():
    time = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 100.5 * time)                                  # half a period is missing at the joint
    swell = np.sin(2 * np.pi * 100 * time) * (0.1 + time)
    assert joint_ranks(tone, 16000)["phase"] > 0.99
    assert joint_ranks(swell, 16000)["level"] > 0.99
    assert joint_ranks(np.sin(2 * np.pi * 100 * time), 16000)["phase"] < 0.95


def test_the_cost_of_a_length_is_measured(tiny_checkpoint):
    found = measure(str(tiny_checkpoint), 0.16, 1, "cpu")
    assert found["seconds"] == 0.16 and found["time"] > 0
    assert found["memory"] is None or found["memory"] >= 0


def test_costs_of_two_lengths_are_compared_second_by_second():
    short, long = {"seconds": 10.0, "time": 2.0, "memory": 10**7}, {"seconds": 100.0, "time": 30.0, "memory": 2 * 10**7}
    lines = table(short, long).splitlines()
    assert lines[2].split() == ["100", "s", "30.00", "s", "0.3000", "s", "20.0", "MB"]
    assert lines[3].split() == ["ratio", "1.50x", "2.00x"]
    assert "not known" in table(short | {"memory": None}, long)


@pytest.mark.parametrize("settings, message", [
    ({"window": 0}, "window"),
    ({"window": -1.0}, "window"),
    ({"window": float("nan")}, "window"),
    ({"overlap": -0.1}, "overlap"),
    ({"overlap": 0.32}, "overlap.*0.32"),
    ({"window": None, "overlap": 2.0}, "overlap.*1.28 seconds.*2"),
    ({"prompt_at": [(2.0, "x")]}, "inside the 1.6 seconds"),
    ({"prompt_at": [(0, "x")]}, "prompt_at.*above 0, got 0"),
    ({"prompt_at": [(0.8, "x"), (0.4, "y")]}, "in order"),
    ({"prompt_at": [(0.8, " ")]}, "empty"),
    ({"prompt_at": [("a", "x")]}, "finite number"),
    ({"prompt_at": [0.8]}, "list of"),
    ({"prompt_at": "0.8:x"}, "list of"),
])
def test_impossible_windows_and_prompts_are_refused_in_one_line(pipe, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(pipe, **settings)
    assert "\n" not in str(error.value)


def test_windows_need_a_conditioning_for_each_prompt(pipe):
    windows = plan(20, 8, 2, borders=[0, 10])
    with pytest.raises(ValueError, match="2 rows"):
        pipe.denoise(pipe.encode(PROMPT), None, torch.zeros(1, 4, 20, 8), Sampling(steps=1), windows=windows)


def command(tiny_checkpoint, path, *arguments) -> int:
    """`ldm2 generate` with one step without guidance."""
    fixed = ("--model", tiny_checkpoint, "--steps", 1, "--guidance-scale", 1, "--seed", 1, "-o", path)
    return main(["generate", *map(str, [*arguments, *fixed])])


def test_the_command_line_makes_a_long_loop_with_several_prompts(tiny_checkpoint, tmp_path, capsys):
    prompts = ("--prompt-at", "0:rain", "--prompt-at", "0.8:a: b")
    settings = ("--seconds", 1.41, "--loop", "--window", 0.4, "--overlap", 0.08)
    assert command(tiny_checkpoint, tmp_path / "x.wav", *prompts, *settings) == 0
    assert "seamless loop, of 1.40 s" in capsys.readouterr().err
    with soundfile.SoundFile(tmp_path / "x.wav") as file:
        assert file.frames == 22400
        made = json.loads(file.copy_metadata()["comment"])
    assert (made["prompt"], made["prompt_at"]) == ("rain", [[0.8, "a: b"]])
    assert (made["seconds"], made["window"], made["overlap"], made["loop"]) == (1.4, 0.4, 0.08, True)


@pytest.mark.parametrize("arguments, words", [
    (["--seconds", "2"], "prompt is needed"),
    (["--prompt-at", "1:rain"], "prompt is needed"),
    (["--prompt-at", "0:"], "empty"),
    (["rain", "--prompt-at", "rain"], "SECONDS:PROMPT"),
    (["rain", "--prompt-at", "99:x"], "inside the"),
    (["rain", "--prompt-at", "nan:x"], "finite"),
    (["rain", "--prompt-at", "2:x", "--prompt-at", "1:y"], "in order"),
    (["rain", "--window", "0"], "window"),
    (["rain", "--window", "1", "--overlap", "1"], "overlap"),
])
def test_the_command_line_refuses_the_impossible_in_one_line(tiny_checkpoint, tmp_path, capsys, arguments, words):
    try:
        code = command(tiny_checkpoint, tmp_path / "x.wav", *arguments)
    except SystemExit as refused:
        code = refused.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and words in lines[0]
    assert not list(tmp_path.iterdir())
