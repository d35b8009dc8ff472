"""What people do with diffusers' AudioLDM2Pipeline: one test for each row of docs/diffusers.md, diffusers beside it.

The usages are those of diffusers' documentation and tests, of the blog post on AudioLDM 2 and of public scripts.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers

import ldm2
import ldm2.compat
from ldm2.checkpoints import hub
from ldm2.checkpoints.adapter import Adapter, LowRank
from ldm2.compat import AudioLDM2Pipeline
from ldm2.runtime.compilation import is_compiled
from tests.helpers import PROMPT, relative

DOCS = Path(__file__).parents[2] / "docs" / "diffusers.md"
CALL = {"prompt": PROMPT, "num_inference_steps": 2, "audio_length_in_s": 0.2}
CLOSE = 5e-5                                               # of latents; samplers differ by ten times as much
USAGES = {}


def usage(text):
    """Registers a test for a row of the table."""
    def register(test):
        assert text not in USAGES
        USAGES[text] = test
        return test

    return register


def load(folder, **options):
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sound(pipe, **changes):
    return pipe(**(CALL | changes), generator=torch.Generator().manual_seed(3)).audios


def latents(pipe, **changes):
    return sound(pipe, **changes, output_type="latent")


class Case:
    """What a test works with: our pipeline, made anew when it is asked for, diffusers', and folders."""

    def __init__(self, folder, oracle, tmp_path, monkeypatch, caplog):
        self.folder, self.oracle, self.tmp = folder, oracle, tmp_path
        self.monkeypatch, self.caplog = monkeypatch, caplog

    @functools.cached_property
    def pipe(self):
        return load(self.folder)

    def same(self, pipe=None, **changes):
        """The latents of both with the same arguments are the same, or what output_type asks for."""
        pipe, made = self.pipe if pipe is None else pipe, sound if "output_type" in changes else latents
        assert relative(made(pipe, **changes), made(self.oracle, **changes)) < (CLOSE if made is latents else 5e-3)

    def refused(self, message, act):
        """One line that says what to do instead."""
        with pytest.raises(ValueError, match=message) as raised:
            act()
        assert "\n" not in str(raised.value)


def loads_with(**options):
    def test(case):
        case.same(load(case.folder, **options))

    return test


def refuses_with(message, **options):
    def test(case):
        case.refused(message, lambda: load(case.folder, **options))

    return test


def accepts(*names):
    def test(case):
        for name in names:
            assert getattr(case.pipe, name)() is None
        case.same(output_type="np")

    return test


# from_pretrained

usage("from_pretrained(name, torch_dtype=torch.float32)")(loads_with(torch_dtype=torch.float32))
usage("from_pretrained(name, dtype=torch.float32)")(loads_with(dtype=torch.float32))
usage('from_pretrained(name, torch_dtype="auto")')(loads_with(torch_dtype="auto"))
usage("from_pretrained(name, use_safetensors=True)")(loads_with(use_safetensors=True))
usage("from_pretrained(name, low_cpu_mem_usage=True)")(loads_with(low_cpu_mem_usage=True))
usage("from_pretrained(name, trust_remote_code=True)")(loads_with(trust_remote_code=True))
usage("from_pretrained(name, local_files_only=True)")(loads_with(local_files_only=True))
usage("from_pretrained(name, max_memory={...}, offload_folder=...)")(
    loads_with(max_memory={"cpu": "1GB"}, offload_folder="x"))
usage('from_pretrained(name, device_map="balanced")')(
    loads_with(device_map="cpu" if torch.cuda.is_available() else "balanced"))
usage('from_pretrained(name, device_map={"": "cpu"})')(loads_with(device_map={"": "cpu"}))
usage("from_pretrained(name, custom_pipeline=...)")(refuses_with("custom_pipeline.*not run", custom_pipeline="x"))
usage("from_pretrained(name, quantization_config=...)")(
    refuses_with(r"quantization_config.*torch\.bfloat16", quantization_config={"load_in_8bit": True}))
usage("from_pretrained(name, force_download=True)")(refuses_with("force_download.*cache", force_download=True))
usage("from_pretrained(name, proxies={...})")(refuses_with("proxies.*HTTPS_PROXY", proxies={"https": "x"}))


@usage("from_pretrained(name, torch_dtype=torch.float16)")
def _(case):
    pipe = load(case.folder, torch_dtype=torch.bfloat16)
    assert pipe.dtype == pipe.unet.dtype == torch.bfloat16
    assert np.isfinite(sound(pipe)).all()
    several = {"unet": torch.float16, "default": torch.float32}
    case.refused("one dtype for all", lambda: load(case.folder, torch_dtype=several))


@usage('from_pretrained(name, variant="fp16")')
def _(case):
    case.oracle.save_pretrained(case.tmp / "x", variant="fp16")
    case.same(load(case.tmp / "x", variant="fp16"))


@usage("from_pretrained(name, cache_dir=..., token=..., revision=...)")
def _(case):
    calls = []

    def resolve(name, revision, local_files_only, **more):
        calls.append(more | {"name": name, "revision": revision})
        return Path(case.folder)

    case.monkeypatch.setattr(hub, "resolve", resolve)
    AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2", cache_dir="c", token="t", revision="r")
    assert calls[0] == {"name": "cvssp/audioldm2", "revision": "r", "cache_dir": "c", "token": "t", "variant": None}


@usage("from_pretrained(name, scheduler=...)")
def _(case):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(case.oracle.scheduler.config)
    pipe = load(case.folder, scheduler=scheduler)
    assert pipe.scheduler is scheduler
    before, case.oracle.scheduler = case.oracle.scheduler, scheduler
    try:
        case.same(pipe, num_inference_steps=4)
    finally:
        case.oracle.scheduler = before


@usage("from_pretrained(name, unet=..., vae=...)")
def _(case):
    unet = copy.deepcopy(case.oracle.unet)
    with torch.no_grad():
        unet.conv_out.bias.fill_(0.5)
    before, case.oracle.unet = case.oracle.unet, unet
    try:
        pipe = load(case.folder, unet=unet, vae=case.oracle.vae, vocoder=case.oracle.vocoder)
        case.same(pipe)
        case.same(pipe, output_type="np")
    finally:
        case.oracle.unet = before
    other = diffusers.AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                                    up_block_types=("UpDecoderBlock2D",) * 2)
    case.refused("AutoencoderKL does not have the structure", lambda: load(case.folder, vae=other))


@usage("from_pretrained(name, something_else=...)")
def _(case):
    with case.caplog.at_level(logging.WARNING):
        case.same(load(case.folder, something_else=1))
    assert "something_else" in case.caplog.text


@usage('from_pretrained("authors.pth")')
def _(case):
    path = case.tmp / "x.pth"
    path.write_bytes(b"")
    case.refused("ldm2 convert", lambda: load(path))


# Where it runs


@usage('pipe.to("cuda")')
def _(case):
    assert case.pipe.to("cpu") is case.pipe
    case.refused("device 'cuda:99' is not available", lambda: case.pipe.to("cuda:99"))


@usage('pipe.to(torch_device="cuda", torch_dtype=torch.float16)')
def _(case):
    moved = case.pipe.to(torch_device="cpu", torch_dtype=torch.bfloat16, silence_dtype_warnings=True)
    assert moved is case.pipe and moved.dtype == moved.vae.dtype == torch.bfloat16


for _name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
    @usage(f"pipe.{_name}()")
    def _(case, name=_name):
        getattr(case.pipe, name)()
        assert next(case.pipe._model.unet.parameters()).is_meta or torch.cuda.is_available()
        if case.pipe.device.type == "cpu":
            case.same(output_type="np")
        case.pipe.to("cpu", torch.bfloat16)
        assert case.pipe.dtype == torch.bfloat16 and case.pipe._model.low_memory
        case.refused("before offloading", lambda: setattr(case.pipe, "vae", case.oracle.vae))


@usage("pipe.remove_all_hooks()")
def _(case):
    case.pipe.enable_model_cpu_offload(device="cpu")
    case.pipe.maybe_free_model_hooks()
    case.pipe.remove_all_hooks()
    assert not case.pipe.unet.conv_out.weight.is_meta
    case.pipe.reset_device_map()
    case.same()


usage("pipe.enable_vae_slicing(), pipe.disable_vae_slicing()")(accepts("enable_vae_slicing", "disable_vae_slicing"))
usage("pipe.enable_vae_tiling(), pipe.disable_vae_tiling()")(accepts("enable_vae_tiling", "disable_vae_tiling"))
usage("pipe.enable_attention_slicing(), pipe.disable_attention_slicing()")(
    accepts("enable_attention_slicing", "disable_attention_slicing"))
usage("pipe.enable_xformers_memory_efficient_attention()")(
    accepts("enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention"))
usage("pipe.fuse_qkv_projections()")(accepts("fuse_qkv_projections", "unfuse_qkv_projections"))


@usage('pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)')
def _(case):
    pytest.importorskip("torch._dynamo")
    part = case.pipe.unet
    case.pipe.unet = torch.compile(case.pipe.unet, mode="reduce-overhead", fullgraph=True)
    assert case.pipe.unet is part and is_compiled(case.pipe._model.unet)


@usage("pipe.unet.compile()")
def _(case):
    case.pipe.unet.compile(mode="max-autotune")
    assert is_compiled(case.pipe._model.unet)


@usage("pipe.vae = torch.compile(pipe.vae), pipe.vocoder = torch.compile(pipe.vocoder)")
def _(case):
    case.pipe.vae, case.pipe.vocoder = torch.compile(case.pipe.vae), torch.compile(case.pipe.vocoder)
    case.pipe.vae.decode = torch.compile(case.pipe.vae.decode)
    case.same(output_type="np")


@usage("pipe.unet.to(memory_format=torch.channels_last)")
def _(case):
    assert case.pipe.unet.to(memory_format=torch.channels_last) is case.pipe.unet
    assert case.pipe.unet.to("cpu", torch.float32) is case.pipe.unet.eval().float()
    case.refused("moves with its pipeline", lambda: case.pipe.vae.to(torch.float16))
    case.refused("moves with its pipeline", lambda: case.pipe.unet.half())
    case.same()


# Schedulers


@usage("pipe.scheduler.config, pipe.scheduler.compatibles")
def _(case):
    ours, theirs = case.pipe.scheduler, case.oracle.scheduler
    assert ours.config.beta_start == theirs.config.beta_start == ours.config["beta_start"]
    known = {cls.__name__ for cls in ours.compatibles}
    assert known <= {cls.__name__ for cls in theirs.compatibles} and len(known) == 9


@usage("pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, ...)")
def _(case):
    before = case.oracle.scheduler
    options = {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}
    try:
        for home in (diffusers, ldm2.compat):
            case.oracle.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(before.config, **options)
            case.pipe.scheduler = home.DPMSolverMultistepScheduler.from_config(case.pipe.scheduler.config, **options)
            case.same(num_inference_steps=6)
    finally:
        case.oracle.scheduler = before
    case.refused("use_karras_sigmas must be False, got True", lambda: setattr(
        case.pipe, "scheduler", diffusers.LMSDiscreteScheduler.from_config(before.config, use_karras_sigmas=True)))
    case.refused("unknown scheduler 'DEISMultistepScheduler'", lambda: setattr(
        case.pipe, "scheduler", diffusers.DEISMultistepScheduler.from_config(before.config)))


@usage('DDIMScheduler.from_pretrained(name, subfolder="scheduler")')
def _(case):
    scheduler = ldm2.compat.DDIMScheduler.from_pretrained(case.folder, subfolder="scheduler", steps_offset=0)
    theirs = diffusers.DDIMScheduler.from_pretrained(case.folder, subfolder="scheduler", steps_offset=0)
    assert {k: v for k, v in theirs.config.items() if k[0] != "_"}.items() <= scheduler.config.items()
    scheduler.save_pretrained(case.tmp)
    assert ldm2.compat.DDIMScheduler.from_pretrained(case.tmp).config == scheduler.config


@usage("pipe.scheduler.set_timesteps(n), .timesteps, .alphas_cumprod, .init_noise_sigma, .add_noise(...)")
def _(case):
    x, noise = torch.randn(2, 1, 4, 5, 8)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
                 "LMSDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"):
        ours = getattr(ldm2.compat, name).from_config(case.pipe.scheduler.config)
        theirs = getattr(diffusers, name).from_config(case.oracle.scheduler.config)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(7)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist() and ours.order == theirs.order
        assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-5)
        assert relative(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-5
        t = theirs.timesteps[2:3]
        assert relative(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t)) < 1e-4
        assert relative(ours.scale_model_input(x, t[0]), theirs.scale_model_input(x, t[0])) < 1e-4


@usage("pipe.scheduler.step(...)")
def _(case):
    case.refused("takes no single steps", lambda: case.pipe.scheduler.step(torch.zeros(1), 1, torch.zeros(1)))


# Parts


@usage("pipe.vocoder.config.sampling_rate, .model_in_dim, .upsample_rates")
def _(case):
    for name in ("sampling_rate", "model_in_dim", "upsample_rates"):
        assert getattr(case.pipe.vocoder.config, name) == getattr(case.oracle.vocoder.config, name)


@usage("pipe.vae.config.block_out_channels, .scaling_factor, .latent_channels")
def _(case):
    for name in ("block_out_channels", "scaling_factor", "latent_channels"):
        ours, theirs = (np.array(getattr(pipe.vae.config, name)) for pipe in (case.pipe, case.oracle))
        assert np.array_equal(ours, theirs)


@usage("pipe.unet.config.sample_size, .in_channels, .cross_attention_dim")
def _(case):
    assert case.pipe.unet.config.sample_size == case.oracle.unet.config.sample_size
    assert case.pipe.unet.config.in_channels == case.oracle.unet.config.in_channels
    widths = [list(row) for row in case.oracle.unet.config.cross_attention_dim]
    assert case.pipe.unet.config["cross_attention_dim"] == widths
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        _ = case.pipe.unet.config.nothing


@usage("pipe.vae_scale_factor, pipe.device, pipe.dtype, pipe.name_or_path")
def _(case):
    assert case.pipe.vae_scale_factor == case.oracle.vae_scale_factor
    assert (case.pipe.device, case.pipe.dtype) == (case.oracle.device, case.oracle.dtype)
    assert case.pipe._execution_device == case.oracle._execution_device
    assert case.pipe.name_or_path == str(case.folder)


@usage("pipe.vae.encode(mel).latent_dist.sample(generator), .mode(), .mean")
def _(case):
    mel = torch.randn(2, 1, 40, 32)
    ours, theirs = (pipe.vae.encode(mel).latent_dist for pipe in (case.pipe, case.oracle))
    for draw in (lambda d: d.mean, lambda d: d.mode(), lambda d: d.std, lambda d: d.var, lambda d: d.logvar,
                 lambda d: d.sample(torch.Generator().manual_seed(1))):
        assert relative(draw(ours).detach(), draw(theirs).detach()) < 1e-4
    assert isinstance(case.pipe.vae.encode(mel, return_dict=False), tuple)


@usage("pipe.vae.decode(z).sample, pipe.vae(mel).sample")
def _(case):
    z, mel = torch.randn(2, 4, 10, 8), torch.randn(1, 1, 40, 32)
    assert relative(case.pipe.vae.decode(z).sample.detach(), case.oracle.vae.decode(z).sample.detach()) < 1e-4
    (first,) = case.pipe.vae.decode(z, return_dict=False)
    assert relative(first.detach(), case.oracle.vae.decode(z)[0].detach()) < 1e-4
    assert relative(case.pipe.vae(mel).sample.detach(), case.oracle.vae(mel).sample.detach()) < 1e-4


@usage("pipe.vae.enable_slicing(), pipe.vae.enable_tiling()")
def _(case):
    for name in ("enable_slicing", "disable_slicing", "enable_tiling", "disable_tiling"):
        getattr(case.pipe.vae, name)()
    case.same(output_type="np")


@usage("pipe.vocoder(mel)")
def _(case):
    mel = torch.randn(2, 40, 32)
    for given in (mel, mel[0]):
        assert relative(case.pipe.vocoder(given).detach(), case.oracle.vocoder(given).detach()) < 1e-4


@usage("pipe.mel_spectrogram_to_waveform(mel)")
def _(case):
    mel = torch.randn(2, 1, 40, 32)
    ours, theirs = case.pipe.mel_spectrogram_to_waveform(mel), case.oracle.mel_spectrogram_to_waveform(mel)
    assert relative(ours, theirs.detach()) < 1e-4


@usage("pipe.unet(latents, t, encoder_hidden_states=..., encoder_hidden_states_1=...).sample")
def _(case):
    x, states, vectors = torch.randn(2, 4, 10, 8), torch.randn(2, 5, 32), torch.randn(2, 8, 24)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = {"encoder_hidden_states": vectors, "encoder_hidden_states_1": states, "encoder_attention_mask_1": mask}
    ours, theirs = (pipe.unet(x, torch.tensor(301), **given).sample.detach() for pipe in (case.pipe, case.oracle))
    assert relative(ours, theirs) < 1e-3
    assert isinstance(case.pipe.unet(x, 301, **given, return_dict=False), tuple)
    case.refused("cross_attention_kwargs", lambda: case.pipe.unet(x, 1, **given, cross_attention_kwargs={"scale": 1}))


@usage("pipe.unet.parameters(), pipe.unet.state_dict(), pipe.unet.load_state_dict(...)")
def _(case):
    ours, theirs = case.pipe.unet.state_dict(), case.oracle.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert sum(p.numel() for p in case.pipe.unet.parameters()) == case.oracle.unet.num_parameters()
    case.pipe.unet.load_state_dict({name: torch.zeros_like(value) for name, value in theirs.items()})
    assert not case.pipe._model.unet.conv_in.weight.any()


@usage("pipe.unet.save_pretrained(folder)")
def _(case):
    with torch.no_grad():
        case.pipe.unet.conv_out.bias.fill_(0.25)
    case.pipe.unet.save_pretrained(case.tmp / "unet")
    read = diffusers.AudioLDM2UNet2DConditionModel.from_pretrained(case.tmp / "unet")
    assert torch.equal(read.conv_out.bias, torch.full_like(read.conv_out.bias, 0.25))
    assert torch.equal(read.conv_in.weight, case.oracle.unet.conv_in.weight)


@usage("pipe.tokenizer(text), pipe.tokenizer_2(text)")
def _(case):
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = (getattr(pipe, name)([PROMPT, "x"], padding=True, return_tensors="pt")
                        for pipe in (case.pipe, case.oracle))
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.attention_mask, theirs.attention_mask)
        assert getattr(case.pipe, name).model_max_length == getattr(case.oracle, name).model_max_length
    case.refused("tokenizer cannot be replaced", lambda: setattr(case.pipe, "tokenizer", case.oracle.tokenizer))


@usage("pipe.feature_extractor")
def _(case):
    assert case.pipe.feature_extractor.sampling_rate == case.oracle.feature_extractor.sampling_rate


@usage("pipe.text_encoder.get_text_features(**tokens)")
def _(case):
    tokens = case.oracle.tokenizer([PROMPT, "x"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (pipe.text_encoder.get_text_features(**tokens) for pipe in (case.pipe, case.oracle))
    assert relative(ours.pooler_output, getattr(theirs, "pooler_output", theirs)) < 1e-4
    assert case.pipe.text_encoder.config.model_type == "clap"
    case.refused("score_waveforms", lambda: case.pipe.text_encoder.get_audio_features(torch.zeros(1)))
    case.refused("text_encoder cannot be replaced",
                 lambda: setattr(case.pipe, "text_encoder", case.oracle.text_encoder))


@usage("pipe.text_encoder_2(input_ids)[0]")
def _(case):
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        assert relative(case.pipe.text_encoder_2(ids)[0], case.oracle.text_encoder_2(ids)[0]) < 1e-4
    assert case.pipe.text_encoder_2.config.model_type == "t5"


@usage("pipe.projection_model(...), pipe.language_model(inputs_embeds=...)")
def _(case):
    given = {"hidden_states": torch.randn(2, 1, 16), "hidden_states_1": torch.randn(2, 6, 32),
             "attention_mask": torch.ones(2, 1), "attention_mask_1": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        ours, theirs = (pipe.projection_model(**given) for pipe in (case.pipe, case.oracle))
        assert relative(ours.hidden_states, theirs.hidden_states) < 1e-4
        assert torch.equal(ours.attention_mask, theirs.attention_mask.long())
        state = case.pipe.language_model(inputs_embeds=ours.hidden_states).last_hidden_state
        assert relative(state, case.oracle.language_model.transformer(inputs_embeds=ours.hidden_states)[0]) < 1e-4


@usage("pipe.language_model = GPT2LMHeadModel...")
def _(case):
    case.pipe.language_model = case.oracle.language_model
    assert case.pipe.language_model is case.oracle.language_model.transformer
    case.same()
    small = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=4))
    case.refused("GPT-2 of the sizes", lambda: setattr(case.pipe, "language_model", small))


@usage("pipe.components, pipe.config")
def _(case):
    assert case.pipe.components.keys() == case.oracle.components.keys()
    assert {name: case.pipe.config[name] for name in ("unet", "vae", "tokenizer")} == {
        name: tuple(case.oracle.config[name]) for name in ("unet", "vae", "tokenizer")}
    assert case.pipe.config._class_name == "AudioLDM2Pipeline"


@usage("pipe.save_pretrained(folder)")
def _(case):
    with torch.no_grad():
        case.pipe.unet.conv_out.bias.fill_(0.25)
    case.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(case.pipe.scheduler.config)
    for variant in (None, "fp16"):
        case.pipe.save_pretrained(case.tmp / "x", variant=variant)     # into a folder that exists, the second time
    for options in ({}, {"variant": "fp16"}):
        again = load(case.tmp / "x", **options)
        assert type(again.scheduler).__name__ == "EulerDiscreteScheduler"
        assert np.array_equal(sound(again), sound(case.pipe))
    theirs = diffusers.AudioLDM2Pipeline.from_pretrained(case.tmp / "x")
    theirs.set_progress_bar_config(disable=True)
    assert relative(sound(case.pipe), sound(theirs)) < 5e-3
    case.refused("safe_serialization", lambda: case.pipe.save_pretrained(case.tmp / "y", safe_serialization=False))
    case.refused("hf upload", lambda: case.pipe.save_pretrained(case.tmp / "y", push_to_hub=True))
    assert not (case.tmp / "y").exists()


@usage("copy.deepcopy(pipe)")
def _(case):
    twin = copy.deepcopy(case.pipe)
    with torch.no_grad():
        twin.unet.conv_out.bias.fill_(9)
    assert not torch.equal(twin.unet.conv_out.bias, case.pipe.unet.conv_out.bias)
    assert twin._model.unet.conv_out.bias is twin.unet.conv_out.bias
    case.same()
    assert not np.array_equal(sound(twin), sound(case.pipe))


@usage("pickle.dumps(pipe)")
def _(case):
    case.pipe.scheduler = ldm2.compat.UniPCMultistepScheduler.from_config(case.pipe.scheduler.config, solver_order=3)
    again = pickle.loads(pickle.dumps(case.pipe))
    assert np.array_equal(sound(again), sound(case.pipe))


# Calls


@usage("pipe(prompt, output_type=..., return_dict=False)")
def _(case):
    for kind in ("np", "pt", "latent"):
        case.same(output_type=kind)
    out = case.pipe(**CALL)
    assert out["audios"] is out.audios is out[0] and out.to_tuple() == (out.audios,)
    assert isinstance(case.pipe(**CALL, return_dict=False), tuple)
    case.refused("output_type 'wav'", lambda: case.pipe(**CALL, output_type="wav"))


@usage("pipe(prompt, negative_prompt=..., guidance_scale=..., num_waveforms_per_prompt=3)")
def _(case):
    case.same(negative_prompt="low quality", guidance_scale=2.5, num_waveforms_per_prompt=3)


@usage("pipe(prompt, generator=torch.Generator(...).manual_seed(seed))")
def _(case):
    for seed in (2**63, 2**64 - 1, -1):
        ours, theirs = (pipe(**CALL, generator=torch.Generator().manual_seed(seed)).audios
                        for pipe in (case.pipe, case.oracle))
        assert relative(ours, theirs) < 5e-3
    case.refused("2 generators for 1", lambda: case.pipe(**CALL, generator=[torch.Generator()] * 2))
    case.refused("generator must be", lambda: case.pipe(**CALL, generator=7))


@usage("pipe(prompt, latents=...)")
def _(case):
    case.same(latents=torch.randn(1, 4, 20, 8), audio_length_in_s=0.4)
    case.same(latents=torch.randn(1, 4, 12, 8), audio_length_in_s=2.0)        # shorter than what is asked for
    case.refused(r"latents must be \(1, 4, frames, 8\), got \(1, 8, 12, 8\)",
                 lambda: case.pipe(**CALL, latents=torch.randn(1, 8, 12, 8)))


@usage("pipe(prompt, callback=..., callback_steps=...)")
def _(case):
    before = case.oracle.scheduler
    try:
        for name in ("DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "EulerDiscreteScheduler"):
            for every in (1, 2):
                calls = []
                for pipe in (case.pipe, case.oracle):
                    pipe.scheduler = getattr(diffusers, name).from_config(before.config)
                    seen = []
                    pipe(**(CALL | {"num_inference_steps": 3}), callback_steps=every,
                         callback=lambda step, t, x, seen=seen: seen.append((step, float(t), tuple(x.shape))))
                    calls.append(seen)
                assert calls[0] == calls[1], (name, every)
    finally:
        case.oracle.scheduler = before
    case.refused("callback_steps.*got 0", lambda: case.pipe(**CALL, callback=print, callback_steps=0))


@usage("pipe(prompt, cross_attention_kwargs={})")
def _(case):
    case.same(cross_attention_kwargs={})
    case.refused("cross_attention_kwargs", lambda: case.pipe(**CALL, cross_attention_kwargs={"scale": 0.5}))


@usage("pipe(prompt, max_new_tokens=...)")
def _(case):
    case.same(max_new_tokens=4)
    case.refused("max_new_tokens.*got 0", lambda: case.pipe(**CALL, max_new_tokens=0))


@usage("pipe.encode_prompt(...), pipe(prompt_embeds=..., generated_prompt_embeds=...)")
def _(case):
    ours, theirs = (pipe.encode_prompt([PROMPT, "x"], "cpu", 2, True, negative_prompt=["low", "y"])
                    for pipe in (case.pipe, case.oracle))
    assert all(relative(a.detach(), b.detach()) < 1e-4 for a, b in zip(ours, theirs))
    states, mask, vectors = theirs
    again = case.pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=states, attention_mask=mask,
                                    generated_prompt_embeds=vectors)
    assert all(relative(a, b.detach()) < 1e-6 for a, b in zip(again, theirs))
    case.same(prompt=None, prompt_embeds=states, attention_mask=mask, generated_prompt_embeds=vectors,
              guidance_scale=1.0)
    case.refused("negative_prompt_embeds needs negative_generated_prompt_embeds",
                 lambda: case.pipe(**CALL, negative_prompt_embeds=states[:1]))


@usage("pipe.generate_language_model(inputs_embeds, max_new_tokens=8, attention_mask=...)")
def _(case):
    given, mask = torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:8] = 0
    with torch.no_grad():
        ours, theirs = (pipe.generate_language_model(given, max_new_tokens=5, attention_mask=mask)
                        for pipe in (case.pipe, case.oracle))
    assert relative(ours, theirs) < 1e-4
    assert case.pipe.generate_language_model(given, max_new_tokens=None).shape == (2, 8, 24)


@usage("pipe.prepare_latents(...)")
def _(case):
    before = case.oracle.scheduler
    try:
        for name in ("DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"):
            made = []
            for pipe in (case.pipe, case.oracle):
                pipe.scheduler = getattr(diffusers, name).from_config(before.config)
                pipe.scheduler.set_timesteps(5)
                made.append(pipe.prepare_latents(2, 4, 40, torch.float32, "cpu", torch.Generator().manual_seed(1)))
            assert relative(*made) < 1e-5
    finally:
        case.oracle.scheduler = before
    case.refused("3 generators for 2", lambda: case.pipe.prepare_latents(
        2, 4, 40, torch.float32, "cpu", [torch.Generator()] * 3))


@usage("pipe.prepare_extra_step_kwargs(generator, eta)")
def _(case):
    before = case.oracle.scheduler
    try:
        for name in ldm2.compat.schedulers.CLASSES:
            for pipe in (case.pipe, case.oracle):
                pipe.scheduler = getattr(diffusers, name).from_config(before.config)
            ours, theirs = (pipe.prepare_extra_step_kwargs(None, 0.5) for pipe in (case.pipe, case.oracle))
            assert ours == theirs, name
    finally:
        case.oracle.scheduler = before


@usage("pipe.check_inputs(...)")
def _(case):
    case.pipe.check_inputs(PROMPT, 1.0, 0.01, 1)
    for words, *given in (
        ("give either prompt", None, 1.0, 0.01, 1), ("audio_length_in_s must", PROMPT, 0.001, 0.01, 1),
        ("callback_steps must", PROMPT, 1.0, 0.01, 0), ("prompt must be a string", 7, 1.0, 0.01, 1),
    ):
        with pytest.raises(ValueError):
            case.oracle.check_inputs(*given)
        case.refused(words, lambda given=given: case.pipe.check_inputs(*given))


@usage("pipe.score_waveforms(text, audio, n, device, dtype)")
def _(case):
    audio = torch.randn(3, 16000) * 0.1
    assert torch.equal(case.pipe.score_waveforms(PROMPT, audio, 3, "cpu", torch.float32), audio)
    find = importlib.util.find_spec
    case.monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "librosa" or find(name, *rest))
    ranked = case.pipe.score_waveforms(PROMPT, audio, 3)
    assert sorted(ranked[:, 0].tolist()) == sorted(audio[:, 0].tolist())
    case.pipe._model._make_ranker = None
    with case.caplog.at_level(logging.WARNING):
        assert torch.equal(case.pipe.score_waveforms(PROMPT, audio, 3), audio)
    assert "not ranked" in case.caplog.text


@usage("pipe.set_progress_bar_config(disable=None, desc=...), pipe.progress_bar(total=n)")
def _(case):
    case.pipe.set_progress_bar_config(disable=True, desc="x", leave=False)
    with case.pipe.progress_bar(total=3) as bar:
        bar.update()
    assert list(case.pipe.progress_bar([1, 2])) == [1, 2]
    case.refused("progress bar knows .*, got colours", lambda: case.pipe.set_progress_bar_config(colours=1))


# The table


@usage("pipe.load_lora_weights(file), .set_adapters(names, weights), .unload_lora_weights()")
def _(case):
    name = "mid_block.attentions.1.transformer_blocks.0.attn1.to_q"
    before = case.oracle.unet.get_parameter(f"{name}.weight").detach().clone()
    layer = LowRank(torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2))
    file = Adapter({f"unet.{name}": layer}).save(case.tmp / "x.safetensors")
    case.pipe.load_lora_weights(case.tmp, weight_name=file.name, adapter_name="x")
    case.pipe.set_adapters(["x"], [0.5])
    with torch.no_grad():
        case.oracle.unet.get_parameter(f"{name}.weight").add_(0.5 * layer.up @ layer.down)
    try:
        case.same()
    finally:
        case.oracle.unet.get_parameter(f"{name}.weight").data = before
    case.pipe.unload_lora_weights()
    case.same()


@pytest.mark.parametrize("text", USAGES)
def test_usage(text, tiny_checkpoint, oracle, tmp_path, monkeypatch, caplog):
    USAGES[text](Case(tiny_checkpoint, oracle, tmp_path, monkeypatch, caplog))


def test_the_table_of_the_documentation_lists_what_is_tested():
    rows = re.findall(r"^\| `(.+?)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(USAGES)


# Several pipelines, other schedulers


def test_pipelines_on_one_model_keep_their_own_schedulers(tiny_checkpoint, oracle):
    first = load(tiny_checkpoint)
    second = copy.copy(first)
    second.scheduler = diffusers.EulerDiscreteScheduler.from_config(first.scheduler.config)
    assert first._model is second._model
    euler = latents(second, num_inference_steps=4)
    assert relative(latents(first, num_inference_steps=4), latents(oracle, num_inference_steps=4)) < CLOSE
    assert relative(euler, latents(first, num_inference_steps=4)) > 10 * CLOSE


def test_impossible_arguments_are_refused_before_anything_is_computed(tiny_checkpoint, monkeypatch):
    pipe = load(tiny_checkpoint)
    monkeypatch.setattr(type(pipe._model.text), "encode", lambda *_, **__: pytest.fail("encoded"))
    for changes in ({"num_inference_steps": 0}, {"num_inference_steps": 1001}, {"guidance_scale": float("nan")},
                    {"eta": 2}, {"num_waveforms_per_prompt": 0}, {"callback": 3}, {"negative_prompt": ["a", "b"]},
                    {"prompt": []}, {"prompt": 3}, {"transcription": 3}, {"audio_length_in_s": "1"}, {"latents": 3}):
        with pytest.raises(ValueError) as raised:
            pipe(**(CALL | changes))
        assert "\n" not in str(raised.value)


def test_a_checkpoint_whose_scheduler_has_options_samples_with_them(tiny_checkpoint, tmp_path, oracle):
    shutil.copytree(tiny_checkpoint, tmp_path / "x")
    options = {"solver_order": 3, "disable_corrector": [1]}
    scheduler = diffusers.UniPCMultistepScheduler.from_config(oracle.scheduler.config, **options)
    scheduler.save_pretrained(tmp_path / "x/scheduler")
    index = json.loads((tmp_path / "x/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (tmp_path / "x/model_index.json").write_text(json.dumps(index))
    before, oracle.scheduler = oracle.scheduler, scheduler
    try:
        expected = latents(oracle, num_inference_steps=6)
    finally:
        oracle.scheduler = before
    assert relative(latents(load(tmp_path / "x"), num_inference_steps=6), expected) < CLOSE
    native = ldm2.load(tmp_path / "x", reference="diffusers")
    assert relative(native.generate(PROMPT, steps=6, seconds=0.2, seed=3, sampler="unipc").latents, expected) < CLOSE
