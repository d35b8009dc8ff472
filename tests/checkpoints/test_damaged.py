"""What a checkpoint must not do in silence: be read as another model, lose a part, hold no numbers, lead elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ldm2
from ldm2 import weights
from ldm2.checkpoints import build, hub, original
from ldm2.checkpoints.convert import convert
from ldm2.checkpoints.describe import describe
from ldm2.checkpoints.original import configuration
from ldm2.checkpoints.reading import read_hub_folder
from ldm2.config import UNetConfig
from ldm2.schedules import Schedule
from ldm2.text.encoders import ClapText, T5Text
from ldm2.text.gpt2 import load_gpt2, load_projection
from ldm2.text.ranking import check_extractor
from tests import authors
from tests.fuzz.damage import WRONG, places, set_field


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(action, match: str) -> str:
    """Run `action`, which must fail in one line. Returns it."""
    with pytest.raises((ValueError, OSError), match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Every field


PARTS = (
    "unet", "vae", "vocoder", "scheduler", "text_encoder", "text_encoder_2", "language_model", "projection_model",
    "feature_extractor",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_value_of_any_field_is_told_in_one_line(folder, part):
    walk(folder, part, values=2)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_wrong_value_of_any_field_is_told_in_one_line(folder, part):
    walk(folder, part, values=len(WRONG))


def walk(folder: Path, part: str, values: int) -> None:
    """Set every field of a part's config to some wrong values, in turn; what is not refused must build the part."""
    for file in sorted((folder / part).glob("*config.json")):
        whole = file.read_text()
        for number, place in enumerate(places(json.loads(whole))):
            for step in range(values):
                value = WRONG[(values * number + step) % len(WRONG)]
                set_field(file, place, value)
                try:
                    load(folder, part)
                except (ValueError, OSError) as error:
                    assert "\n" not in str(error)
                    assert folder.name in str(error), (place, value, str(error))
                file.write_text(whole)


def load(folder: Path, part: str) -> None:
    """Read the files of a part, and build it without memory."""
    checkpoint = read_hub_folder(folder)
    texts = {
        "text_encoder": (ClapText.load, "clap"), "text_encoder_2": (T5Text.load, "t5"),
        "language_model": (load_gpt2,), "projection_model": (load_projection,),
    }
    if part == "scheduler":
        Schedule.from_json(folder / "scheduler/scheduler_config.json")
    elif part in build.MODELS:
        build.model(checkpoint[part], part, device="meta")
    elif part == "feature_extractor":
        check_extractor(folder / part / "preprocessor_config.json")
    elif part in texts:
        loader, *encoder = texts[part]
        build.text_part(checkpoint[part], loader, *map(checkpoint.tokenizer, encoder), device="meta")


@pytest.mark.parametrize("name", [
    "TCDScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "os.system", ["DDIM"],
])
def test_schedules_of_another_kind_of_model_are_refused(folder, name):
    change(folder / "scheduler/scheduler_config.json", _class_name=name)
    refused(lambda: ldm2.load(folder), r"scheduler_config\.json: _class_name must be one of DDIMScheduler, .*, got ")


@pytest.mark.parametrize("part, name", [
    ("unet", "UNet2DModel"), ("vae", "VQModel"), ("vocoder", "HifiGan"), ("text_encoder", "BertModel"),
    ("scheduler", "TCDScheduler"), ("language_model", "os.system"), ("_class_name", "StableDiffusionPipeline"),
])
def test_the_classes_of_a_checkpoint_are_read(folder, part, name):
    change(folder / "model_index.json", **{part: name if part[0] == "_" else ["diffusers", name]})
    refused(lambda: ldm2.load(folder), f"model_index.json: .*{part}|model_index.json: ldm2 has no '{name}'")


@pytest.mark.parametrize("part, field, name", [
    ("unet", "_class_name", "UNet3D"), ("vae", "_class_name", "AsymmetricAutoencoderKL"),
    ("vocoder", "model_type", "univnet"), ("text_encoder", "model_type", "clip"),
    ("text_encoder_2", "model_type", "mt5"), ("language_model", "model_type", "opt"),
    ("language_model", "activation_function", "relu"), ("text_encoder_2", "feed_forward_proj", "gated-silu"),
    ("projection_model", "_class_name", "Linear"),
])
def test_a_part_that_says_it_is_something_else_is_refused(folder, part, field, name):
    change(folder / part / "config.json", **{field: name})
    refused(lambda: ldm2.load(folder), f"{part}.*{field}.*{name}")


def test_a_single_number_of_heads_has_the_published_meaning_or_none(folder):
    file = folder / "unet/config.json"
    change(file, attention_head_dim=4)
    refused(
        lambda: UNetConfig.from_json(file),
        "'attention_head_dim' must list the heads of each level, or be 8.*got 4",
    )
    assert UNetConfig.from_json(file, "diffusers").num_heads == (4, 4, 4)


# Numbers


@pytest.mark.parametrize("dtype", [
    torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn,
])
def test_weights_are_floating_numbers(dtype):
    tensors = {"weight": torch.ones(2, 3).to(dtype), "bias": torch.ones(2)}
    kind = "weight is int8 and has no weight_scale" if dtype == torch.int8 else "1 not float16 .* float64 \\(weight"
    refused(lambda: weights.load(nn.Linear(3, 2), tensors, source="a file"), f"a file.*: {kind}")


def test_sparse_quantized_and_absent_weights_are_refused():
    weight = torch.ones(2, 3)
    for odd in (weight.to_sparse(), torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), weight.to("meta")):
        refused(lambda odd=odd: weights.load(nn.Linear(3, 2), {"weight": odd, "bias": torch.ones(2)}), "1 not float16")


def test_a_table_of_numbers_is_not_floating():
    norm = nn.BatchNorm1d(2)
    tensors = dict(norm.state_dict())
    refused(lambda: weights.load(norm, tensors | {"num_batches_tracked": torch.tensor(0.5)}), "num_batches_tracked")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(number, dtype):
    tensors = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, number])}
    refused(
        lambda: weights.load(nn.Linear(3, 2), tensors, dtype=dtype, source="a file"),
        "a file: bias holds NaN or inf",
    )


def test_large_mapped_weights_are_looked_through_before_the_first_stage(folder, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    file = folder / "vocoder/model.safetensors"
    tensors = load_file(file)
    tensors["conv_post.bias"][0] = float("inf")            # tanh makes a finite sound of it
    save_file(tensors, file)
    pipe = ldm2.load(folder)
    refused(lambda: pipe.encode("a dog"), "copy/vocoder: conv_post.bias holds NaN or infinite")
    sleeping = ldm2.load(folder, low_memory=True)
    refused(lambda: sleeping.generate("a dog", seconds=0.1, steps=1), "copy/vocoder: conv_post.bias holds NaN")


def test_damaged_weights_of_the_ranking_are_told(folder, caplog):
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["audio_projection.linear1.bias"][0] = float("nan")
    save_file(tensors, file)
    made = ldm2.load(folder).generate("a dog", seconds=0.1, steps=1, num_waveforms=2)
    assert made.scores is None
    assert "ranking failed" in caplog.text
    assert "audio_projection.linear1.bias holds NaN or infinite numbers" in caplog.text


def test_two_names_of_one_table_hold_the_same(folder):
    file = folder / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, file)
    refused(lambda: ldm2.load(folder), "text_encoder_2 does not fit.* 1 different under two names")


def test_a_token_beyond_the_table_names_the_tokenizer(folder):
    file = folder / "tokenizer/tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"] = {
        token: number if number < 5 else number + 5000 for token, number in fields["model"]["vocab"].items()
    }
    file.write_text(json.dumps(fields))
    refused(lambda: ldm2.load(folder).encode("a dog"), "tokenizer of CLAP gives the number 5.*, but its table has 300")


# Files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
@pytest.mark.parametrize("name", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_pipe_is_no_file_to_read(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(lambda: ldm2.load(folder), f"{Path(name).name} is not a file")


@pytest.mark.parametrize("name", ["vocoder", "scheduler", "unet", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(folder, name):
    shutil.rmtree(folder / name)
    refused(lambda: ldm2.load(folder), f"copy/{name}.* is (missing|not complete)")


@pytest.mark.parametrize("content, reason", [
    ("[" * 100_000, "nested too deeply"), ("{", "Expecting"), ('{"a": ' + "9" * 5000 + "}", "digit"),
])
def test_json_that_python_cannot_read_is_one_line(folder, content, reason):
    (folder / "unet/config.json").write_text(content)
    refused(lambda: ldm2.load(folder), f"unet/config.json: not valid JSON .*{reason}")


def test_a_user_without_a_home_is_one_line():
    refused(lambda: ldm2.load("~nosuchuser/model"), "~nosuchuser/model: this user has no home folder")


def test_the_bundled_model_has_no_revisions():
    refused(lambda: hub.resolve("tiny", revision="main"), "tiny is part of this package")


# Small files, large work


@pytest.mark.parametrize("part, field, value", [
    ("unet", "block_out_channels", [10**9, 64, 96]), ("unet", "layers_per_block", 10**6),
    ("vae", "layers_per_block", 5000), ("vocoder", "upsample_initial_channel", 2**40),
    ("language_model", "n_layer", 10**6), ("language_model", "n_positions", 10**9), ("language_model", "n_head", -1),
    ("text_encoder_2", "num_layers", 2000), ("text_encoder_2", "d_model", 2**31), ("text_encoder_2", "vocab_size", 0),
    ("projection_model", "text_encoder_dim", 10**9), ("scheduler", "num_train_timesteps", 10**9),
])
def test_sizes_beyond_every_model_are_refused_before_anything_is_made(folder, part, field, value):
    change(next((folder / part).glob("*config.json")), **{field: value})
    refused(lambda: ldm2.load(folder), field)


def test_a_number_beyond_every_layer_makes_no_tables():
    state = authors.golden_state("film")
    name = "model.diffusion_model.input_blocks.999999999.0.in_layers.0.weight"
    refused(lambda: original.split(state | {name: torch.zeros(1)}, {}, "file.pth"), "file.pth holds 1 unknown")


def test_aliases_of_yaml_do_not_multiply(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    refused(lambda: configuration.read(tmp_path / "bomb.yaml"), "bomb.yaml holds more than 10000 values")
    (tmp_path / "loop.yaml").write_text("a: &a [*a]")
    refused(lambda: configuration.read(tmp_path / "loop.yaml"), "loop.yaml holds more than 10000 values")


# The authors' files


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return authors.whole_state(authors.modules("sound"))


@pytest.mark.parametrize("lost", [
    "cond_stage_models.1.model.encoder.block.1.", "cond_stage_models.0.cond_stage_models.1.model.encoder.block.1.",
    "clap.model.text_branch.encoder.layer.1.", "cond_stage_models.0.cond_stage_models.0.model.audio_branch.layers.1.",
])
def test_a_copy_of_an_encoder_that_lost_a_layer_is_told_by_the_other(state, lost):
    left = {name: tensor for name, tensor in state.items() if not name.startswith(lost)}
    assert len(left) < len(state)
    refused(
        lambda: original.split(left, {}, "file.pth"),
        "file.pth is not complete: its 2 (T5 encoders|CLAPs) differ in",
    )


@pytest.mark.parametrize("lost, message", [
    (r"cond_stage_models.0.model.h.11.", "language_model has n_layer 11, the published one 12"),
    (r"encoder.block.23.", "text_encoder_2 has num_layers 23, the published one 24"),
    (r"text_branch.encoder.layer.11.", "text_encoder has num_hidden_layers 11, the published one 12"),
    (r"audio_branch.layers.2.blocks.11.", r"depths \[2, 2, 11, 2\], the published one \[2, 2, 12, 2\]"),
])
def test_the_layers_of_the_published_encoders_are_known(lost, message):
    whole = authors.layout_state(authors.layouts()["audioldm2-full"])
    left = {name: tensor for name, tensor in whole.items() if lost not in name}
    assert len(left) < len(whole)
    refused(lambda: original.split(left, {"scale_factor": 0.4}, "file.pth"), message)


def test_a_unet_that_lost_what_its_average_has_is_not_complete():
    state = authors.golden_state("base")
    lost = {name: tensor for name, tensor in state.items() if "output_blocks.11." not in name}
    refused(
        lambda: original.split(lost, authors.config("base"), "file.pth"),
        "file.pth is not complete: its UNet lacks",
    )


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(0.0), torch.tensor(1)])
def test_the_scale_factor_is_one_positive_number(state, value):
    refused(
        lambda: original.split(state | {"scale_factor": value}, {}, "file.pth"),
        "scale_factor must be one positive",
    )


# Conversion stays inside


def test_a_part_outside_the_folder_is_not_converted(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "tokenizer.json").write_text("{}")
    change(folder / "model_index.json", **{"../secret": ["transformers", "RobertaTokenizer"]})
    refused(lambda: convert(folder, tmp_path / "made"), "model_index.json: \"../secret\" is not the name of a folder")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("linked", ["tokenizer/notes.txt", "unet/notes.txt", "README.md", "tokenizer"])
def test_what_a_link_points_to_outside_is_not_copied(folder, tmp_path, linked):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("not for others")
    place = folder / linked
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(secret if linked == "tokenizer" else secret / "key")
    refused(lambda: convert(folder, tmp_path / "made"), "is a link to .*secret")
    assert not any("not for others" in file.read_text() for file in tmp_path.rglob("made*/**/*.txt"))


def test_the_links_of_the_hubs_cache_are_followed(tiny_checkpoint, tmp_path):
    cache = tmp_path / "models--somebody--a-model"
    snapshot = cache / "snapshots/0123"
    for file in tiny_checkpoint.rglob("*"):
        if file.is_file():
            blob, link = cache / "blobs" / str(abs(hash(file))), snapshot / file.relative_to(tiny_checkpoint)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)
    made = convert(snapshot, tmp_path / "made").folder
    sizes = [{part.name: part.size for part in describe(path).parts} for path in (made, tiny_checkpoint)]
    assert sizes[0] == sizes[1]


def test_a_damaged_file_of_the_cache_says_how_to_fetch_it_anew(folder, tmp_path):
    snapshot = tmp_path / "models--somebody--a-model/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot / "vae/config.json").write_text("{")
    refused(lambda: ldm2.load(snapshot), "vae/config.json: not valid JSON .*: `ldm2 download --force ")


def test_nan_is_not_converted(folder, tmp_path):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][:] = float("nan")
    save_file(tensors, file)
    refused(lambda: convert(folder, tmp_path / "made"), "decoder.conv_out.bias holds NaN or infinite numbers")


def test_the_whole_checkpoint_still_loads(tiny_checkpoint):
    assert ldm2.load(tiny_checkpoint).generate("a dog", seconds=0.1, steps=1, seed=1).waveforms.shape == (1, 1600)
