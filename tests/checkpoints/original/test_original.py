"""The authors' files: recorded outputs, published key lists, other implementations as oracles, bad files."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import checkpoints
from ldm2 import samplers
from ldm2.checkpoints import original
from ldm2.checkpoints.original import keys
from ldm2.conditioning import Conditioning
from ldm2.guidance import Guidance
from tests import authors

KINDS = ("base", "film")
LAYOUTS = authors.layouts()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The recorded checkpoints as `.pth` files."""
    folder = tmp_path_factory.mktemp("authors")
    kinds = (*KINDS, "sequence", "phoneme")
    return {kind: authors.save(authors.golden_state(kind), folder / f"{kind}.pth") for kind in kinds}


@pytest.fixture(scope="module")
def opened(files) -> dict[str, original.Components]:
    return {kind: original.components(files[kind], authors.config(kind)) for kind in KINDS}


def conditioning(golden: dict[str, torch.Tensor], side: str, rows: int = 2) -> Conditioning:
    """The recorded conditioning of a side, "cond" or "uncond", for `rows` rows."""
    contexts = [golden[name].expand(rows, -1, -1) for name in sorted(golden) if name.startswith(f"{side}.context")]
    masks = [golden[name].expand(rows, -1) for name in sorted(golden) if name.startswith(f"{side}.mask")]
    film = golden.get(f"{side}.film")
    return Conditioning(tuple(contexts), tuple(masks), None if film is None else film.squeeze(1).expand(rows, -1))


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bar


# Recorded outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side, out", [("cond", "unet.out"), ("uncond", "unet.out_uncond")])
@torch.no_grad()
def test_unet_equals_the_authors(opened, kind, side, out):
    golden = authors.golden(kind)
    eps = opened[kind].unet(golden["unet.x"], golden["unet.t"], conditioning(golden, side))
    assert_within(eps, golden[out], 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_vae_equals_the_authors(opened, kind):
    golden, parts = authors.golden(kind), opened[kind]
    posterior = parts.vae.encode(golden["vae.mel"])
    assert_within(posterior.mean, golden["vae.mean"], 2e-5)
    assert_within(posterior.logvar, golden["vae.logvar"], 2e-5)
    assert_within(parts.vae.decode(golden["vae.decode_in_scaled"] / parts.scale_factor), golden["vae.decode_out"], 5e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_vocoder_equals_the_authors(opened, kind):
    golden = authors.golden(kind)
    assert_within(opened[kind].vocoder(golden["vocoder.mel"]), golden["vocoder.wav"][:, 0], 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_whole_sampling_run_equals_the_authors(opened, kind):
    golden, parts = authors.golden(kind), opened[kind]
    denoiser = Guidance(
        parts.unet, conditioning(golden, "cond"), conditioning(golden, "uncond"), 3.5, dtype=torch.float32
    ).denoiser()
    noise = iter(golden["generate.step_noise"])
    latents = samplers.sample(
        "ddim", denoiser, golden["generate.x_T"], parts.schedule, 5, eta=1.0, noise=lambda like: next(noise)
    )
    assert_within(latents, golden["generate.latent"], 5e-4)
    mel = parts.vae.decode(latents / parts.scale_factor)
    assert_within(mel[:, :, :8], golden["generate.mel"], 5e-4)
    assert_within(parts.vocoder(mel)[:, None, :2400], golden["generate.wav"], 5e-4)


def test_the_moving_average_is_not_used(opened):
    state = authors.golden_state("base")
    average = state["model_ema.diffusion_modelinput_blocks00weight"]
    raw = state["model.diffusion_model.input_blocks.0.0.weight"]
    assert not torch.equal(average, raw)
    assert torch.equal(opened["base"].unet.conv_in.weight, raw)


@pytest.mark.parametrize("kind, factor", [("base", 0.4110932946205139), ("film", 0.35)])
def test_scale_factor_is_that_of_the_file(opened, kind, factor):
    assert opened[kind].scale_factor == pytest.approx(factor, rel=1e-7)
    assert opened[kind].vae.config.scaling_factor == opened[kind].scale_factor


def test_parts_that_the_file_lacks_are_none(opened, files):
    assert opened["base"].text is None
    sequence = original.components(files["sequence"])
    assert (sequence.unet, sequence.vae, sequence.vocoder, sequence.scale_factor) == (None, None, None, None)


@torch.no_grad()
def test_gpt2_loop_equals_the_authors(files):
    golden = authors.conditioning()
    text = original.components(files["sequence"]).text
    clap, mask = golden["seq.clap"][:, 0], golden["seq.t5_mask"].bool()
    sequence, kept = text.projection(clap, golden["seq.t5"], mask)
    assert_within(sequence, golden["seq.input_embeds"], 2e-6)
    assert torch.equal(kept, golden["seq.input_mask"].bool())
    assert_within(text.generate(clap, golden["seq.t5"], mask, 8), golden["seq.generated"], 5e-5)


@torch.no_grad()
def test_phoneme_encoder_equals_the_authors(files):
    golden = authors.conditioning()
    parts = original.components(files["phoneme"])
    states = parts.text.phonemes.encode(golden["phon.ids"], golden["phon.mask"].bool())
    positions = parts.parts["projection_model"].tensors["learnable_positional_embedding"]
    assert_within(states + positions.transpose(1, 2), golden["phon.out"], 5e-5)


# Configuration


def test_a_yaml_file_is_read_as_configuration(files, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model:\n  params:\n    linear_start: 0.0015\n    unet_config:\n      params: {num_head_channels: 8}\n"
    )
    assert original.components(files["film"], path).unet.config.num_heads == (4, 8, 12, 20)


@pytest.mark.parametrize("value", [0, "8", None])
def test_an_impossible_number_of_head_channels_is_refused(value):
    config = {"model": {"params": {"unet_config": {"params": {"num_head_channels": value}}}}}
    with pytest.raises(ValueError, match="num_head_channels must be a positive integer"):
        original.split(authors.golden_state("film"), config, "file.pth")


def test_without_configuration_heads_have_32_channels(files):
    assert original.components(files["film"]).unet.config.num_heads == (1, 2, 3, 5)


def test_a_configuration_of_another_model_is_refused(files):
    with pytest.raises(ValueError, match=r"config says num_res_blocks 2, the file holds 1"):
        original.read(files["film"], authors.config("base"))


def test_a_schedule_other_than_the_files_is_refused(files):
    with pytest.raises(ValueError, match="betas"):
        original.read(files["film"], {"model": {"params": {"linear_end": 0.02}}})


def test_v_prediction_comes_from_the_configuration(files):
    parts = original.components(files["film"], {"model": {"params": {"parameterization": "v"}}})
    assert parts.schedule.prediction_type == "v_prediction"


def test_a_missing_configuration_file_is_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml is missing"):
        original.read(files["film"], tmp_path / "nowhere.yaml")


# Published key lists


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> components of a stand-in for this published checkpoint, opened once."""
    folder, cache = tmp_path_factory.mktemp("published"), {}

    def open_once(name: str) -> original.Components:
        if name not in cache:
            path = authors.save(authors.layout_state(LAYOUTS[name]), folder / "checkpoint.pth")
            cache[name] = original.components(path, local_files_only=True)
        return cache[name]

    return open_once


@pytest.mark.parametrize("name, contexts, film, encoders, rate", [
    ("audioldm2-full", (None, 768, 1024), None, "clap t5 projection gpt2", 16000),
    ("audioldm2-full-large-1150k", (None, 768, 1024, None), None, "clap t5 projection gpt2", 16000),
    ("audioldm2-speech-gigaspeech", (None, 768), None, "clap phonemes projection gpt2", 16000),
    ("audioldm_16k_crossattn_t5", (None, 1024), None, "t5", 16000),
    ("audioldm_48k", (None, None), 512, "clap", 48000),
])
def test_a_published_layout_fills_every_parameter(published, name, contexts, film, encoders, rate):
    parts = published(name)                                # loading is strict: nothing is missing, nothing is left over
    assert parts.unet.config.context_dims == ((), *[contexts] * 3)
    assert parts.unet.config.film_dim == film
    assert parts.unet.config.num_heads == (4, 8, 12, 20)
    kinds = ("clap", "t5", "phonemes", "projection", "gpt2")
    assert [kind for kind in kinds if getattr(parts.text, kind) is not None] == encoders.split()
    assert parts.vocoder.config.sample_rate == rate


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_of_a_published_layout_is_used_once_or_dropped_on_purpose(name):
    state = authors.layout_state(LAYOUTS[name])
    parts = original.split(state, {}, name)
    used = Counter(tensor.data_ptr() for part in parts.values() for tensor in part.tensors.values())
    for key, tensor in state.items():                      # each has a memory of its own
        times = used[tensor.data_ptr()]
        dropped = re.fullmatch("|".join((*keys.DROPPED, "betas|scale_factor", *SECOND_COPIES[name])), key)
        inside = re.fullmatch(DROPPED_INSIDE, key)
        expected = 0 if dropped or inside else 3 if ".qkv." in key else 2 if "_of_sequence_tokens" in key else 1
        assert times == expected, key


DROPPED_INSIDE = (
    r".*\.(?:attn_mask|(?:text|audio)_transform\..*|encoder\.embed_tokens\.weight)"
    r"|.*\.audio_branch\.(?:spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*"
)
SECOND_COPIES = {
    "audioldm2-full": [r"clap\..*", r"cond_stage_models\.1\..*"],
    "audioldm2-full-large-1150k": [r"clap\..*", r"cond_stage_models\.1\..*"],
    "audioldm2-speech-gigaspeech": [r"clap\..*"],
    "audioldm_16k_crossattn_t5": [],
    "audioldm_48k": [r"clap\..*"],
}


# Other implementations as oracles


@pytest.fixture(scope="module")
def large():
    """A UNet of the kind of audioldm2-full-large: contexts [24, 40, null], depth 2, heads of 32 channels."""
    return checkpoints.unet(
        block_out_channels=(32, 64), cross_attention_dim=[[None, 24, 40, None]] * 2, attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2, layers_per_block=2, norm_num_groups=32,
    )


@torch.no_grad()
def test_a_unet_with_three_contexts_and_depth_two_equals_diffusers(large, tmp_path):
    parts = original.components(authors.save(authors.state(unet=large), tmp_path / "large.pth"))
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in [(2, 4, 12, 8), (2, 8, 24), (2, 5, 40)])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ours = parts.unet(x, torch.tensor([7, 901]), Conditioning((a, b), (None, mask)))
    theirs = large(
        x, torch.tensor([7, 901]), encoder_hidden_states=a, encoder_hidden_states_1=b, encoder_attention_mask_1=mask
    ).sample
    assert_within(ours, theirs, 2e-5)


@torch.no_grad()
def test_vae_and_vocoder_names_go_round_through_the_authors_names(tmp_path):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = checkpoints.vae(block_out_channels=(32, 64, 64, 96), norm_num_groups=32, **levels)
    vocoder = checkpoints.vocoder(resblock_dilation_sizes=[[1, 3, 5]] * 2)
    path = authors.save(authors.state(vae=vae, vocoder=vocoder), tmp_path / "parts.pth")
    parts = original.components(path)
    assert parts.unet is None
    latents = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(0))
    mel = vae.decode(latents).sample
    assert_within(parts.vae.decode(latents), mel, 2e-5)
    assert_within(parts.vocoder(mel), vocoder(mel[:, 0]), 2e-5)


@torch.no_grad()
def test_clap_text_equals_transformers(clap_file):
    clap, path = clap_file
    text = original.components(path, tokenizers=None, local_files_only=True).text
    ids = torch.tensor([[0, 17, 45, 8, 2], [0, 99, 2, 1, 1]])
    mask = ids.ne(1)
    theirs = clap.get_text_features(input_ids=ids, attention_mask=mask)
    theirs = getattr(theirs, "pooler_output", theirs)
    states = text.clap.text_model(input_ids=ids, attention_mask=mask)
    ours = torch.nn.functional.normalize(text.clap.text_projection(states.pooler_output), dim=-1)
    assert_within(ours, theirs, 2e-6)


@torch.no_grad()
def test_clap_audio_equals_transformers(clap_file):
    from ldm2.text.ranking import ClapAudio

    clap, path = clap_file
    part = original.read(path)["text_encoder"]
    audio = ClapAudio.load(part.fields, part.tensors, checkpoints.feature_extractor())
    features = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(0))
    theirs = clap.audio_model(input_features=features).pooler_output
    assert_within(audio.audio_model(input_features=features).pooler_output, theirs, 2e-5)
    for name, field in {"depths": [2, 2], "num_attention_heads": [1, 2], "window_size": 4, "hidden_size": 64}.items():
        assert part.fields["audio_config"][name] == field


def test_candidates_are_ranked_with_the_clap_of_the_file(clap_file, tmp_path):
    checkpoints.roberta_tokenizer().save_pretrained(tmp_path / "tokenizer")
    ranker = original.ranker(original.read(clap_file[1]), tokenizers=tmp_path)
    noise = torch.randn(2, 4800, generator=torch.Generator().manual_seed(0))
    scores = ranker.scores(["a dog barking in the rain"], noise, 48_000)
    assert scores.shape == (1, 2)
    assert scores.abs().max() <= 1


def test_a_file_without_clap_cannot_rank(opened):
    with pytest.raises(ValueError, match="cannot rank"):
        original.ranker(opened["base"].parts)


@pytest.fixture(scope="module")
def clap_file(tmp_path_factory):
    """A CLAP with heads of 64 channels, and the authors' file that holds it as the only conditioning."""
    clap = authors.clap()
    path = tmp_path_factory.mktemp("clap") / "clap.pth"
    return clap, authors.save(authors.text_state(clap=clap), path)


# Files of the training, and of AudioLDM 1


TRAINING_ONLY = [
    "first_stage_model.loss.logvar", "first_stage_model.loss.perceptual_loss.net.slice1.0.weight",
    "first_stage_model.loss.discriminator.main.0.weight", "model_ema.decay", "model_ema.num_updates",
    "model_ema.diffusion_modelout2weight", "logvar", "ddim_sigmas", "ddim_alphas_prev", "clap.mel_transform.window",
    "cond_stage_models.0.cond_stage_models.2.audiomae.cls_token", "cond_stage_models.2.audiomae.cls_token",
]


def test_what_only_training_reads_is_dropped(files):
    state = authors.golden_state("film")
    expected = original.split(state, {}, "file.ckpt")
    parts = original.split(state | {name: torch.full((2,), torch.nan) for name in TRAINING_ONLY}, {}, "file.ckpt")
    assert {name: (part.fields, list(part.tensors)) for name, part in parts.items()} == {
        name: (part.fields, list(part.tensors)) for name, part in expected.items()
    }


def test_a_lightning_checkpoint_is_read(tmp_path):
    state = authors.golden_state("film")
    path = tmp_path / "checkpoint-fad-133.00-global_step=25009.ckpt"
    torch.save({
        "epoch": 3, "global_step": 25009, "pytorch-lightning_version": "2.1.3", "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": OrderedDict(ready=4)}}, "callbacks": {},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}}],
        "lr_schedulers": [{"base_lrs": [np.float64(1e-4)], "last_lr": np.array([1e-4])}],
        "hyper_parameters": {"latent_t_size": np.int64(256), "dtype": np.dtype("float32")},
    }, path)
    assert original.read(path).keys() == original.split(state, {}, "").keys()


def test_the_conditioning_of_audioldm_1_has_no_number(clap_file, tmp_path):
    clap, path = clap_file
    state = authors.text_state(clap=clap)
    names = {name: name.replace("cond_stage_models.0.", "cond_stage_model.") for name in state}
    unet = checkpoints.unet(
        block_out_channels=(32, 64), cross_attention_dim=[[None]] * 2, attention_head_dim=(1, 2), norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        class_embed_type="simple_projection", class_embeddings_concat=True, projection_class_embeddings_input_dim=64,
    )
    state = authors.state(unet=unet) | {names[name]: tensor for name, tensor in state.items()}
    found = original.components(authors.save(state, tmp_path / "audioldm-s-full"), tokenizers=tokenizers(tmp_path))
    expected = original.components(path, tokenizers=tmp_path).text.encode(["a dog"])
    conditioning = found.text.encode(["a dog"])
    assert torch.equal(conditioning.film, expected.film)
    x = torch.randn(1, 4, 16, 8)
    with torch.no_grad():
        theirs = unet(x, torch.tensor([7]), None, class_labels=conditioning.film).sample
        assert_within(found.unet(x, torch.tensor([7]), conditioning), theirs, 2e-5)


def tokenizers(folder: Path) -> Path:
    checkpoints.roberta_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


# Bad files


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_file_with_code_in_it_is_refused_and_nothing_of_it_runs(tmp_path, write):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    write({"state_dict": {"a": torch.zeros(2)}, "x": Payload(marker)}, path)
    with pytest.raises(ValueError, match="nothing of it was run") as error:
        original.components(path)
    assert "model.diffusion_model" in one_line(error)      # what was expected
    assert not marker.exists()


def test_a_truncated_file_is_one_line(files, tmp_path):
    path = tmp_path / "half.pth"
    path.write_bytes(files["film"].read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"half\.pth is damaged") as error:
        original.components(path)
    assert "expected" in one_line(error)


@pytest.mark.parametrize("content, found", [
    ({"unet.down_blocks.0.lora_A.weight": torch.zeros(1)}, "is a LoRA"),
    ({"state_dict": {"model.layers.0.weight": torch.zeros(1)}}, "found 1 tensors"),
    ({"state_dict": {}}, "found 0 tensors"),
    ([torch.zeros(1)], "not a dict of named tensors"),
])
def test_a_foreign_file_is_one_line(tmp_path, content, found):
    path = tmp_path / "foreign.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=found) as error:
        original.components(path)
    assert "expected" in one_line(error)


@pytest.mark.parametrize("name", [
    "control_model.weight", "model.diffusion_model.new.weight", "first_stage_model.losses.weight",
    "cond_stage_models.3.model.weight", "cond_stage_model.model.weight",
])
def test_an_unknown_key_is_an_error(name):
    state = authors.golden_state("film") | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=name.rpartition(".")[0].rpartition(".")[2]) as error:
        original.split(state, {}, "file.pth")
    one_line(error)


@pytest.mark.parametrize("name, message", [
    ("model.diffusion_model.out.2.weight", r"not complete: conv_out\.weight is missing"),
    ("first_stage_model.vocoder.conv_pre.weight", "has no conv_pre"),
    ("scale_factor", "no scale_factor"),
])
def test_a_key_that_tells_a_size_must_be_there(name, message):
    state = authors.golden_state("film")
    del state[name]
    with pytest.raises(ValueError, match=message) as error:
        original.split(state, {}, "file.pth")
    one_line(error)


def test_any_other_missing_key_is_an_error_too(tmp_path):
    state = authors.golden_state("film")
    del state["model.diffusion_model.out.0.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(conv_norm_out\.bias\)") as error:
        original.components(authors.save(state, tmp_path / "less.pth"))
    one_line(error)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        original.components(tmp_path)
    with pytest.raises(ValueError, match=r"none\.pth is missing"):
        original.components(tmp_path / "none.pth")


def test_an_unknown_vocoder_asks_for_the_configuration(tmp_path):
    vocoder = checkpoints.vocoder(upsample_kernel_sizes=[10, 8, 4, 4, 4])
    path = authors.save(authors.state(vocoder=vocoder), tmp_path / "vocoder.pth")
    with pytest.raises(ValueError, match="pass the authors' configuration"):
        original.components(path)


def test_two_different_t5_encoders_are_refused(tmp_path):
    state = authors.text_state(t5=checkpoints.t5(1)) | {
        name.replace("models.0.", "models.1."): tensor
        for name, tensor in authors.text_state(t5=checkpoints.t5(2)).items() if name.startswith("cond_stage_models.0.")
    }
    with pytest.raises(ValueError, match="2 T5 encoders differ"):
        original.read(authors.save(state, tmp_path / "two.pth"))


# Memory and tokenizers


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_opening_does_not_read_what_is_dropped(tmp_path):
    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    state = authors.state(vocoder=checkpoints.vocoder(resblock_dilation_sizes=[[1, 3, 5]] * 2))
    path = authors.save(state | {"model_ema.diffusion_modelbig": torch.zeros(32_000_000)}, tmp_path / "big.pth")
    before = resident()
    parts = original.components(path)
    assert parts.vocoder is not None
    assert resident() - before < 60_000                    # kB; the dropped tensor alone is 125 000


def test_tokenizers_come_from_a_folder(clap_file, tmp_path):
    checkpoints.roberta_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = original.components(clap_file[1], tokenizers=tmp_path).text
    with torch.no_grad():
        film = text.encode(["a dog barking in the rain"]).film
    assert film.shape == (1, 64)


def test_a_folder_without_tokenizer_is_named(clap_file, tmp_path):
    with pytest.raises(ValueError, match="tokenizer is missing"):
        original.components(clap_file[1], tokenizers=tmp_path)


def test_a_tokenizer_that_cannot_be_had_is_an_error_at_the_first_prompt(clap_file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = original.components(clap_file[1], local_files_only=True).text
    with pytest.raises(OSError, match="pass tokenizers=FOLDER") as error:
        text.encode(["a dog"])
    one_line(error)


def test_an_authors_speech_file_needs_no_tokenizer_for_its_phonemes(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = authors.save(authors.whole_state(authors.modules("speech")), tmp_path / "speech.pth")
    text = original.components(path, local_files_only=True).text
    assert text.phonemes.tokenize_ipa("hɛlo") == (50, 86, 54, 57)  # VITS numbers a to z from 43, its IPA from 69


def test_the_tokenizer_of_another_speech_model_is_refused(tmp_path):
    path = authors.save(authors.whole_state(authors.modules("speech")), tmp_path / "speech.pth")
    folder = authors.save_tokenizers(tmp_path / "tokenizers", speech=True)
    vocabulary = folder / "tokenizer_2/vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz'-")}))
    with pytest.raises(ValueError, match=r"183 phonemes.*30 symbols"):
        original.components(path, tokenizers=folder)
