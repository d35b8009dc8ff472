"""Converted folders compute what their source computes, in ldm2 and in diffusers; nothing is left half-written."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import ldm2
from benchmarks import checkpoints
from ldm2.checkpoints import convert as conversion
from ldm2.checkpoints.convert import convert, license_notice
from tests import authors
from tests.helpers import PROMPT

KINDS = ("sound", "speech", "film", "t5")
SETTINGS = {"seconds": 0.3, "steps": 3, "seed": 1, "guidance_scale": 3.5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (authors' file, folder with tokenizers, converted folder), made once."""
    cache = {}

    def make(kind: str) -> tuple[Path, Path, Path]:
        if kind not in cache:
            folder = tmp_path_factory.mktemp(kind)
            path = authors.save(authors.whole_state(authors.modules(kind)), folder / "model.pth")
            tokenizers = authors.save_tokenizers(folder / "tokenizers", speech=kind == "speech")
            cache[kind] = path, tokenizers, convert(path, folder / "converted", tokenizers=tokenizers).folder
        return cache[kind]

    return make


@pytest.fixture(scope="module")
def golden_film(tmp_path_factory) -> Path:
    """The recorded checkpoint `film` (no text encoders), converted."""
    folder = tmp_path_factory.mktemp("golden")
    path = authors.save(authors.golden_state("film"), folder / "film.pth")
    return convert(path, folder / "film", config=authors.config("film")).folder


@pytest.fixture(scope="module")
def pickles(tmp_path_factory) -> Path:
    """A speech checkpoint in the hub's layout with pickles for weights, as anhnct/* are published."""
    folder = checkpoints.save_speech(tmp_path_factory.mktemp("pickles") / "speech")
    for file in list(folder.rglob("*.safetensors")):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [speech]\n---\n\nWords.\n")
    return folder


def words(kind: str) -> dict[str, str]:
    return {"phonemes": "hɛlo"} if kind == "speech" else {}


def assert_close(ours: np.ndarray, theirs: np.ndarray, bar: float = 2e-4) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bar * np.abs(theirs).max()


# The function stays the same


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_gives_the_sound_of_the_file(made, kind):
    path, tokenizers, folder = made(kind)
    ours = ldm2.load(folder).generate(PROMPT, **words(kind), **SETTINGS)
    theirs = ldm2.load(path, tokenizers=tokenizers).generate(PROMPT, **words(kind), **SETTINGS)
    assert_close(ours.waveforms, theirs.waveforms)
    assert_close(ours.latents.numpy(), theirs.latents.numpy())


@pytest.mark.parametrize("kind", ["sound", "speech"])
def test_diffusers_gives_the_same_sound_with_a_converted_folder(made, kind, monkeypatch):
    path, tokenizers, folder = made(kind)
    pipeline = diffusers.AudioLDM2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind == "speech":
        pipeline.text_encoder_2.text_encoder.config._attn_implementation = "eager"
    theirs = pipeline(
        PROMPT, transcription="hɛlo" if kind == "speech" else None, audio_length_in_s=SETTINGS["seconds"],
        num_inference_steps=SETTINGS["steps"], guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
    ).audios
    settings = SETTINGS | words(kind) | {"guidance_scale": 1.0}
    ours = ldm2.load(path, tokenizers=tokenizers, reference="diffusers").generate(PROMPT, **settings)
    assert_close(ours.waveforms, theirs)


@torch.no_grad()
def test_diffusers_gives_the_authors_outputs_with_a_converted_folder(golden_film):
    golden = authors.golden("film")
    unet = diffusers.AudioLDM2UNet2DConditionModel.from_pretrained(golden_film, subfolder="unet")
    eps = unet(golden["unet.x"], golden["unet.t"], None, class_labels=golden["cond.film"][:, 0]).sample
    assert (eps - golden["unet.out"]).abs().max() <= 2e-5
    vae = diffusers.AutoencoderKL.from_pretrained(golden_film, subfolder="vae")
    latents = golden["vae.decode_in_scaled"] / vae.config.scaling_factor
    assert (vae.decode(latents).sample - golden["vae.decode_out"]).abs().max() <= 5e-5
    vocoder = transformers.SpeechT5HifiGan.from_pretrained(golden_film, subfolder="vocoder")
    assert (vocoder(golden["vocoder.mel"][:, 0]) - golden["vocoder.wav"][:, 0]).abs().max() <= 2e-5


def test_heads_are_listed_per_level(golden_film):
    assert json.loads((golden_film / "unet/config.json").read_text())["attention_head_dim"] == [4, 8, 12, 20]


def test_the_default_length_in_diffusers_is_that_of_the_training(golden_film):
    unet, vae = (json.loads((golden_film / part / "config.json").read_text()) for part in ("unet", "vae"))
    assert unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) == 1024


def test_a_converted_clap_can_rank(made):
    result = ldm2.load(made("sound")[2]).generate(PROMPT, num_waveforms=2, **SETTINGS | {"steps": 1})
    assert len(result.scores) == 2


# Folders of pickles


def test_a_folder_of_pickles_becomes_safetensors_with_the_same_sound(pickles, tmp_path):
    folder = convert(pickles, tmp_path / "speech").folder
    assert not list(folder.rglob("*.bin"))
    assert (folder / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "text_encoder_2/model.safetensors").is_file()
    settings = SETTINGS | {"phonemes": "hɛlo"}
    assert_close(ldm2.load(folder).generate(PROMPT, **settings).waveforms,
                 ldm2.load(pickles).generate(PROMPT, **settings).waveforms)


def test_a_scalar_of_heads_is_listed_as_the_reference_reads_it(pickles, tmp_path):
    def heads(folder: Path) -> list[int]:
        return json.loads((folder / "unet/config.json").read_text())["attention_head_dim"]

    assert heads(convert(pickles, tmp_path / "trained").folder) == [1, 2, 3]
    assert heads(convert(pickles, tmp_path / "scalar", reference="diffusers").folder)[1:] == [8, 8]


def test_the_licence_of_the_source_travels_along(pickles, tmp_path):
    made = convert(pickles, tmp_path / "speech")
    assert (made.folder / "README.md").read_text() == (pickles / "README.md").read_text()
    assert "creativeml-openrail-m" in made.notice


def test_the_licence_of_an_authors_file_is_told_by_the_table_of_models(made, tmp_path):
    path = tmp_path / "audioldm2-full.pth"
    path.symlink_to(made("t5")[0])
    converted = convert(path, tmp_path / "folder", tokenizers=made("t5")[1])
    assert "CC-BY-NC-ND-4.0" in converted.notice
    assert "do not redistribute this folder" in converted.notice
    assert (converted.folder / "README.md").read_text().startswith("---\nlicense: cc-by-nc-nd-4.0\n---\n")


def test_an_unknown_licence_is_said_to_be_unknown():
    assert "not known" in license_notice(None)[0]


def test_other_licences_do_not_forbid_to_share():
    assert not any("yourself" in sentence for sentence in license_notice("CC-BY-NC-4.0"))


# Precision


@pytest.mark.parametrize("dtype, stored", [("float16", "F16"), ("bfloat16", "BF16"), (torch.float32, "F32")])
def test_floating_tensors_are_stored_in_the_precision_asked_for(made, tmp_path, dtype, stored):
    folder = convert(made("sound")[0], tmp_path / "half", dtype, tokenizers=made("sound")[1]).folder
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        assert kinds <= {stored, "I64"}
    assert json.loads((folder / "text_encoder/config.json").read_text())["dtype"] in str(dtype)


def test_bfloat16_is_the_rounded_weight(made, tmp_path):
    folder = convert(made("t5")[0], tmp_path / "half", "bfloat16", tokenizers=made("t5")[1]).folder
    wide = load_file(made("t5")[2] / "vae/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, wide[name].bfloat16())


def test_a_weight_beyond_float16_is_an_error_that_names_it(tmp_path):
    state = authors.golden_state("film")
    state["model.diffusion_model.out.2.bias"] = torch.full((4,), 1e5)
    path = authors.save(state, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"conv_out\.bias holds numbers beyond"):
        convert(path, tmp_path / "half", "float16")
    assert not (tmp_path / "half").exists()


def test_an_unknown_dtype_lists_the_known_ones(made, tmp_path):
    with pytest.raises(ValueError, match="choose from float32, float16, bfloat16"):
        convert(made("t5")[0], tmp_path / "x", "int4")


# Interruptions and what is in the way


@pytest.fixture
def interrupted(made, tmp_path, monkeypatch) -> Path:
    """The target of a conversion that was stopped in the middle of the vocoder."""
    write = conversion.write_safetensors

    def stop_at_vocoder(path: Path, *arguments: object) -> None:
        if path.parent.name == "vocoder":
            path.with_name(f"{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(conversion, "write_safetensors", stop_at_vocoder)
    with pytest.raises(KeyboardInterrupt):
        convert(made("t5")[0], tmp_path / "folder", tokenizers=made("t5")[1])
    monkeypatch.setattr(conversion, "write_safetensors", write)
    return tmp_path / "folder"


def test_an_interrupted_conversion_leaves_nothing_under_the_final_name(interrupted):
    assert not interrupted.exists()
    assert (interrupted.with_name("folder.partial") / "unet/config.json").is_file()


def test_a_second_call_keeps_the_parts_that_are_complete(interrupted, made):
    unet = interrupted.with_name("folder.partial") / "unet/diffusion_pytorch_model.safetensors"
    number = unet.stat().st_ino
    folder = convert(made("t5")[0], interrupted, tokenizers=made("t5")[1]).folder
    assert (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_ino == number
    assert not interrupted.with_name("folder.partial").exists()
    names = {file.relative_to(folder) for file in folder.rglob("*")}
    assert names == {file.relative_to(made("t5")[2]) for file in made("t5")[2].rglob("*")}


def test_parts_of_another_precision_are_not_taken_up(interrupted, made):
    folder = convert(made("t5")[0], interrupted, "bfloat16", tokenizers=made("t5")[1]).folder
    with safe_open(folder / "unet/diffusion_pytorch_model.safetensors", "pt") as tensors:
        assert tensors.get_slice("conv_in.weight").get_dtype() == "BF16"


def test_an_existing_folder_needs_overwrite(made, tmp_path):
    path, tokenizers, _ = made("t5")
    folder = convert(path, tmp_path / "folder", tokenizers=tokenizers).folder
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(path, folder, tokenizers=tokenizers)
    convert(path, folder, "bfloat16", overwrite=True, tokenizers=tokenizers)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder"]


def test_overwrite_never_replaces_a_folder_that_is_no_checkpoint(made, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a checkpoint, it is not overwritten"):
        convert(made("t5")[0], tmp_path / "precious", overwrite=True)


def test_a_partial_folder_of_somebody_else_is_left_alone(made, tmp_path):
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no conversion made it"):
        convert(made("t5")[0], tmp_path / "folder")


def test_a_folder_is_not_converted_onto_itself(pickles):
    with pytest.raises(ValueError, match="holds the source"):
        convert(pickles, pickles, overwrite=True)


def test_tokenizers_for_a_folder_that_has_its_own_are_refused(pickles, tmp_path):
    with pytest.raises(ValueError, match="has its own"):
        convert(pickles, tmp_path / "folder", tokenizers=tmp_path)


def test_a_missing_parent_folder_is_named(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        convert(made("t5")[0], tmp_path / "nowhere" / "folder")


def test_a_file_without_unet_is_refused(tmp_path):
    path = authors.save(authors.state(vocoder=checkpoints.vocoder()), tmp_path / "vocoder.pth")
    with pytest.raises(ValueError, match="holds no UNet"):
        convert(path, tmp_path / "folder")


def test_a_tokenizer_that_cannot_be_had_is_told_and_the_rest_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    made_here = convert(made("t5")[0], tmp_path / "folder", local_files_only=True)
    assert "It lacks tokenizer_2/" in made_here.notice
    assert (made_here.folder / "unet/config.json").is_file()
