"""The public API on a tiny random checkpoint: parity with diffusers, seeds, batches, lengths, errors."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2.checkpoints import hub
from ldm2.pipeline import NonFiniteError
from ldm2.runtime.device import choose_device, choose_dtype
from ldm2.settings import PRESETS
from tests.helpers import PROMPT, relative

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    """ldm2 on the tiny checkpoint with the authors' arithmetic."""
    return ldm2.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def like_diffusers(tiny_checkpoint):
    """ldm2 on the tiny checkpoint with diffusers' arithmetic."""
    return ldm2.load(tiny_checkpoint, reference="diffusers")


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_variant_that_diffusers_saved_is_read_as_diffusers_reads_it(tmp_path, oracle, low_memory):
    oracle.save_pretrained(tmp_path / "x", variant="fp16")
    settings = {"steps": 2, "seconds": 0.1, "seed": 1}
    pipe = ldm2.load(tmp_path / "x", reference="diffusers", variant="fp16", low_memory=low_memory)
    theirs = diffusers.AudioLDM2Pipeline.from_pretrained(tmp_path / "x", variant="fp16")
    theirs.set_progress_bar_config(disable=True)
    _, audio = diffusers_run(theirs, seed=1, prompt=PROMPT, num_inference_steps=2, audio_length_in_s=0.1)
    assert relative(pipe.generate(PROMPT, **settings).waveforms, audio) < 5e-3
    assert pipe.generate(PROMPT, num_waveforms=2, **settings).scores is not None
    with pytest.raises(ValueError, match=r"holds no weights: .* load its variant 'fp16'"):
        ldm2.load(tmp_path / "x")


def test_a_part_without_the_variant_gives_its_plain_weights(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "x")
    plain = tmp_path / "x/vae/diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    ldm2.load(tmp_path / "x", variant="fp16")
    with pytest.raises(ValueError, match="holds no weights of the variant 'int8'"):
        ldm2.load(tmp_path / "x", variant="int8")


def test_load_hands_the_cache_and_the_token_to_the_hub(tmp_path, tiny_checkpoint, monkeypatch):
    def resolve(name, revision, local_files_only, **settings):
        asked.update(settings)
        return tiny_checkpoint

    asked = {}
    monkeypatch.setattr(hub, "resolve", resolve)
    ldm2.load("somebody/x", cache_dir=tmp_path, token="secret")
    assert asked == {"cache_dir": tmp_path, "token": "secret", "variant": None}


def diffusers_run(oracle, seed=7, **arguments):
    """Latents and audio of diffusers' pipeline, which decodes the former as its own call does."""
    latents = oracle(**arguments, generator=torch.Generator().manual_seed(seed), output_type="latent").audios
    with torch.no_grad():
        mel = oracle.vae.decode(latents / oracle.vae.config.scaling_factor).sample
        audio = oracle.mel_spectrogram_to_waveform(mel)
    return latents, audio[:, : int(arguments["audio_length_in_s"] * oracle.vocoder.config.sampling_rate)].numpy()


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_sampler_gives_the_latents_and_audio_of_diffusers(oracle, monkeypatch, like_diffusers, sampler, steps):
    scheduler, arguments = SCHEDULERS[sampler]
    monkeypatch.setattr(
        oracle, "scheduler", getattr(diffusers, scheduler).from_config(oracle.scheduler.config, **arguments)
    )
    latents, audio = diffusers_run(oracle, prompt=PROMPT, num_inference_steps=steps, audio_length_in_s=0.4)
    result = like_diffusers.generate(PROMPT, seconds=0.4, steps=steps, seed=7, sampler=sampler)
    assert relative(result.latents, latents) < 2e-4
    assert relative(result.waveforms, audio) < 5e-3


@pytest.mark.parametrize("seconds", [0.04, 0.05, 0.5, 0.77, 1.03])
def test_odd_lengths_with_a_negative_prompt_give_the_audio_of_diffusers(oracle, like_diffusers, seconds):
    latents, audio = diffusers_run(
        oracle, prompt=PROMPT, negative_prompt="low quality", num_inference_steps=3, audio_length_in_s=seconds
    )
    result = like_diffusers.generate(PROMPT, "low quality", seconds=seconds, steps=3, seed=7)
    assert relative(result.latents, latents) < 2e-4
    assert relative(result.waveforms, audio) < 5e-3


def test_without_guidance_one_branch_gives_the_audio_of_diffusers(oracle, like_diffusers):
    latents, audio = diffusers_run(
        oracle, prompt=PROMPT, guidance_scale=1.0, num_inference_steps=3, audio_length_in_s=0.4
    )
    result = like_diffusers.generate(PROMPT, guidance_scale=1.0, seconds=0.4, steps=3, seed=7)
    assert relative(result.latents, latents) < 2e-4
    assert relative(result.waveforms, audio) < 5e-3


def test_stochastic_ddim_draws_the_noise_of_diffusers(oracle, like_diffusers):
    latents, _ = diffusers_run(oracle, prompt=PROMPT, eta=0.7, num_inference_steps=5, audio_length_in_s=0.4)
    result = like_diffusers.generate(PROMPT, eta=0.7, seconds=0.4, steps=5, seed=7)
    assert relative(result.latents, latents) < 2e-4


def test_the_two_references_differ(pipe, like_diffusers):
    results = [p.generate(PROMPT, seconds=0.2, steps=2, seed=0).latents for p in (pipe, like_diffusers)]
    assert relative(*results) > 1e-2


def test_equal_seeds_give_equal_audio_and_other_seeds_do_not(pipe):
    a, b, c = (pipe.generate(PROMPT, seconds=0.2, steps=2, seed=seed).waveforms for seed in (3, 3, 4))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_a_batch_of_prompts_agrees_with_each_prompt_alone(pipe, sampler):
    prompts = [PROMPT, "techno", "a hammer hitting a wooden surface again and again"]
    together = pipe.generate(prompts, ["low quality", "x", "y z"], seconds=0.3, steps=3, seed=11, sampler=sampler)
    for row, (prompt, negative) in enumerate(zip(prompts, ["low quality", "x", "y z"])):
        alone = pipe.generate(prompt, negative, seconds=0.3, steps=3, seed=11 + row, sampler=sampler)
        assert relative(together.latents[row : row + 1], alone.latents) < 1e-4
        assert relative(together.waveforms[row : row + 1], alone.waveforms) < 1e-4


def test_candidates_are_the_waveforms_of_their_seeds_best_first(pipe):
    ranked = pipe.generate(PROMPT, seconds=0.3, steps=2, seed=5, num_waveforms=3)
    assert sorted(ranked.seeds) == [5, 6, 7]
    assert ranked.scores == sorted(ranked.scores, reverse=True)
    for row, seed in enumerate(ranked.seeds):
        alone = pipe.generate(PROMPT, seconds=0.3, steps=2, seed=seed)
        assert relative(ranked.waveforms[row : row + 1], alone.waveforms) < 1e-4


def test_candidates_of_each_prompt_are_ranked_apart(pipe):
    ranked = pipe.generate([PROMPT, "techno"], seconds=0.3, steps=2, seed=5, num_waveforms=2)
    assert sorted(ranked.seeds[:2]) == [5, 6]
    assert sorted(ranked.seeds[2:]) == [7, 8]


def test_settings_make_the_sound_again(pipe):
    first = pipe.generate(PROMPT, "low quality", seconds=0.2, steps=2, eta=0.5, num_waveforms=1)
    settings = json.loads(json.dumps(first.settings))
    assert settings["model"] and settings["reference"] == "authors"
    names = ("prompt", "negative_prompt", "seconds", "steps", "guidance_scale", "sampler", "eta", "seed")
    again = pipe.generate(**{name: settings[name] for name in names})
    assert np.array_equal(first.waveforms, again.waveforms)


def test_a_model_without_a_student_tells_how_to_make_one(pipe):
    with pytest.raises(ValueError, match=r"no LoRA named 'instant': it has none; .*`ldm2 train distill.*--lora OUT"):
        pipe.generate(PROMPT, preset="instant")


def test_settings_of_a_preset_make_the_sound_again(pipe):
    first = pipe.generate(PROMPT, seconds=0.2, preset="fast", steps=4, reuse=2, seed=3)
    settings = json.loads(json.dumps(first.settings))
    assert settings["sampler"] == PRESETS["fast"]["sampler"]
    assert settings["spacing"] == PRESETS["fast"]["spacing"]
    again = pipe.generate(**settings)
    assert np.array_equal(first.waveforms, again.waveforms)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m-sde"])
def test_guidance_in_all_of_the_run_is_guidance_and_in_none_of_it_is_none(pipe, sampler):
    settings = {"seconds": 0.2, "steps": 3, "seed": 1, "sampler": sampler}
    plain, alone = (pipe.generate(PROMPT, **settings, guidance_scale=scale).latents for scale in (3.5, 1.0))
    assert torch.equal(pipe.generate(PROMPT, **settings, guidance_interval=(0, 1)).latents, plain)
    assert torch.equal(pipe.generate(PROMPT, **settings, guidance_interval=(0.4, 0.4)).latents, alone)
    assert not torch.equal(pipe.generate(PROMPT, **settings, guidance_interval=(0.5, 1)).latents, plain)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m"])
def test_the_spacing_that_the_checkpoint_has_changes_nothing_and_another_does(pipe, sampler):
    settings = {"seconds": 0.2, "steps": 3, "seed": 1, "sampler": sampler}
    plain = pipe.generate(PROMPT, **settings).latents
    own = pipe.schedule.timestep_spacing
    assert torch.equal(pipe.generate(PROMPT, **settings, spacing=own).latents, plain)
    assert not torch.equal(pipe.generate(PROMPT, **settings, spacing="trailing").latents, plain)
    assert pipe.schedule.timestep_spacing == own == "leading"


def test_the_unet_sees_the_timesteps_of_the_spacing(pipe, monkeypatch):
    visited = []
    forward = pipe.unet.forward

    def watched(x_t, t, prepared, time):
        visited.append((t, time is not None))
        return forward(x_t, t, prepared, time)

    monkeypatch.setattr(pipe.unet, "forward", watched)
    pipe.generate(PROMPT, seconds=0.2, steps=4, spacing="trailing", seed=0)
    assert visited == [(999, True), (749, True), (499, True), (249, True)]


def test_the_unet_is_called_on_both_branches_inside_the_interval_only(pipe, monkeypatch):
    rows = []
    forward = pipe.unet.forward

    def counted(x_t, t, prepared, time):
        rows.append(prepared.rows)
        return forward(x_t, t, prepared, time)

    monkeypatch.setattr(pipe.unet, "forward", counted)
    pipe.generate(PROMPT, seconds=0.2, steps=10, guidance_interval=(0.2, 0.6), seed=0)
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("seconds", [0.001, 0.0401, 0.123456, 0.5, 2.0])
def test_audio_is_cut_to_the_asked_seconds(pipe, seconds):
    result = pipe.generate(PROMPT, seconds=seconds, steps=1, guidance_scale=1, seed=0)
    assert result.waveforms.shape == (1, round(seconds * 16000))
    assert result.waveforms.dtype == np.float32
    assert result.sample_rate == 16000


def test_result_holds_the_intermediates(pipe):
    result = pipe.generate([PROMPT, "techno"], seconds=0.32, steps=1, seed=0)
    assert result.latents.shape == (2, 4, 8, 8)
    assert result.mel.shape == (2, 32, 32)
    mel = pipe.decode(result.latents)
    assert torch.equal(mel[:, 0], result.mel)
    assert np.array_equal(pipe.vocode(mel)[:, :5120].numpy(), result.waveforms)


def test_results_are_compared_without_an_error_and_indexed_by_numbers(pipe):
    result = pipe.generate(PROMPT, seed=[1, 2], num_waveforms=2, seconds=0.2, steps=1)
    assert result == result and result != result[0] and result in {result} and result[0] not in [result[0]]
    with pytest.raises(TypeError, match="'slice' object cannot be interpreted as an integer"):
        result[0:1]


def test_given_latents_replace_those_of_the_seed(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    given = pipe.generate(PROMPT, seconds=0.32, steps=2, seed=1, latents=latents)
    drawn = pipe.generate(PROMPT, seconds=0.32, steps=2, seed=9)
    assert np.array_equal(given.waveforms, drawn.waveforms)


def test_a_callback_that_cannot_be_called_is_refused(pipe):
    with pytest.raises(ValueError, match="callback must be callable, got 3"):
        pipe.generate(PROMPT, seconds=0.2, steps=1, callback=3)


def test_callback_sees_every_step_and_can_stop(pipe):
    seen = []
    pipe.generate(PROMPT, seconds=0.2, steps=4, seed=0, callback=lambda step, total, x: seen.append((step, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ldm2.Cancelled):
        pipe.generate(PROMPT, seconds=0.2, steps=4, seed=0, callback=lambda step, total, x: step < 2)


def test_global_random_state_is_left_alone(pipe):
    before = torch.get_rng_state()
    pipe.generate(PROMPT, seconds=0.2, steps=2, eta=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_stays_near_float32(tiny_checkpoint, pipe):
    half = ldm2.load(tiny_checkpoint, dtype="bfloat16").generate(PROMPT, seconds=0.2, steps=2, seed=0)
    full = pipe.generate(PROMPT, seconds=0.2, steps=2, seed=0)
    assert half.waveforms.dtype == np.float32
    assert relative(half.latents, full.latents) < 0.1


def test_overflow_names_the_stage_and_the_way_out(pipe):
    with pytest.raises(NonFiniteError, match="VAE"):
        pipe.decode(torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(NonFiniteError, match="vocoder"):
        pipe.vocode(torch.full((1, 1, 8, 32), float("nan")))


@pytest.mark.parametrize("arguments, message", [
    ({"prompt": ""}, "empty"),
    ({"prompt": "   "}, "empty"),
    ({"prompt": []}, "prompt.*at least one text"),
    ({"prompt": 3}, "string"),
    ({"prompt": ["a", 3]}, "string"),
    ({"seconds": 0}, "seconds"),
    ({"seconds": 1e-6}, "one sample"),
    ({"seconds": -1}, "seconds"),
    ({"seconds": float("nan")}, "seconds"),
    ({"seconds": 1e9}, "seconds"),
    ({"steps": 0}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": 1001}, "steps"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"sampler": "magic"}, "unknown sampler 'magic'.*ddim.*unipc"),
    ({"eta": 2.0}, "eta"),
    ({"eta": 0.5, "sampler": "euler"}, "eta"),
    ({"preset": "quick"}, "unknown preset 'quick', choose from fast"),
    ({"preset": "fast", "eta": 0.5}, "eta 0.5 with dpmpp-2m"),
    ({"guidance_interval": (0.5, 0.4)}, "guidance_interval.*0.5 to 0.4"),
    ({"guidance_interval": 0.5}, "guidance_interval.*0.5"),
    ({"reuse": 0}, "cache_interval.*0"),
    ({"spacing": "karras"}, "unknown spacing 'karras', choose from leading, trailing, linspace"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": [1, 2]}, "seed.*1 waveforms, got 2"),
    ({"num_waveforms": 0}, "num_waveforms"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
    ({"latents": torch.zeros(1, 4, 3, 8)}, "latents"),
    ({"transcription": "hello"}, "transcription is only for speech models"),
])
def test_bad_arguments_are_refused_in_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe.generate(**({"prompt": PROMPT, "seconds": 0.2, "steps": 2} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, message", [
    ({"reference": "nobody"}, "authors, diffusers"),
    ({"device": "gpu"}, "cuda"),
    ({"device": "cuda:99"}, "CUDA devices"),
    ({"dtype": "int4"}, "float32, float16, bfloat16"),
    ({"low_memory": "no"}, "low_memory must be True or False, got 'no'"),
    ({"compile": "no"}, "compile must be True or False, got 'no'"),
    ({"local_files_only": None}, "local_files_only must be True or False, got None"),
])
def test_bad_places_to_load_are_refused_with_the_valid_ones(tiny_checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        ldm2.load(tiny_checkpoint, **arguments)


def test_auto_means_float32_on_a_cpu_and_float16_on_cuda():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_device("cpu") == torch.device("cpu")


def test_a_checkpoint_brings_its_own_defaults(tmp_path):
    folder = checkpoints.save(tmp_path / "checkpoint")
    (folder / "ldm2.json").write_text('{"seconds": 0.16, "steps": 3, "sampler": "euler"}')
    settings = ldm2.load(folder).generate(PROMPT, seed=0).settings
    assert (settings["seconds"], settings["steps"], settings["sampler"]) == (0.16, 3, "euler")
    (folder / "ldm2.json").write_text('{"second": 1}')
    with pytest.raises(ValueError, match="second"):
        ldm2.load(folder)


def test_a_checkpoint_with_the_scheduler_of_a_consistency_model_is_sampled_as_one(tmp_path):
    folder = checkpoints.save(tmp_path / "checkpoint")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "LCMScheduler"}))
    settings = ldm2.load(folder).generate(PROMPT, seed=0, seconds=0.16).settings
    assert (settings["sampler"], settings["steps"], settings["guidance_scale"]) == ("lcm", 4, 1.0)
    (folder / "ldm2.json").write_text('{"steps": 2}')
    assert ldm2.load(folder).generate(PROMPT, seed=0, seconds=0.16).settings["steps"] == 2


def test_each_text_is_encoded_once_however_often_it_comes(tiny_checkpoint, monkeypatch):
    pipe = ldm2.load(tiny_checkpoint)
    seen = []
    encode = pipe.text.t5.forward
    monkeypatch.setattr(pipe.text.t5, "forward", lambda prompts, *more: seen.extend(prompts) or encode(prompts, *more))
    changes = [(0.2, "techno music"), (0.4, PROMPT)]
    pipe.generate(PROMPT, seconds=0.6, steps=1, seed=0, num_waveforms=2, prompt_at=changes, window=0.4)
    assert sorted(seen) == sorted([PROMPT, "techno music", ""])
