"""Checkpoints in the authors' layout: the small ones whose outputs they recorded, stand-ins for the published ones with
their names and shapes, and tiny ones with the weights of diffusers' and transformers' modules."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import torch
import transformers
from diffusers import AudioLDM2ProjectionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import checkpoints

DATA = Path(__file__).parent / "data" / "original"

PARTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "vocoder": "first_stage_model.vocoder.",
}


# Recorded


def golden(kind: str) -> dict[str, Tensor]:
    """Inputs and outputs of the authors' code; see data/original.md."""
    return load_file(DATA / f"{kind}.safetensors")


def conditioning() -> dict[str, Tensor]:
    """Inputs and outputs of the authors' GPT-2 loop and phoneme encoder."""
    return load_file(DATA.parent / "conditioning" / "golden.safetensors")


def config(kind: str) -> dict:
    """The configuration of a recorded checkpoint in the authors' words."""
    return json.loads((DATA / f"{kind}_config.json").read_text())


def golden_state(kind: str) -> dict[str, Tensor]:
    """Weights of a recorded checkpoint: views into banks of seeded normal numbers, and the buffers of the schedule."""
    spec = json.loads(lzma.decompress((DATA / f"{kind}.json.xz").read_bytes()))
    generator = torch.Generator().manual_seed(spec["seed"])
    draws = [torch.randn(size, generator=generator) for size in spec["draws"]]
    banks = [
        draws[draw][start : start + length] * scale + shift for draw, start, length, scale, shift in spec["banks"]
    ]
    state = {}
    for name, (bank, shape, offset, *stride) in spec["tensors"].items():
        stride = stride[0] if stride else torch.empty(shape, device="meta").stride()
        state[name] = banks[bank].as_strided(shape, stride, offset)
    for name, (dtype, shape, value) in spec["numbers"].items():
        state[name] = torch.tensor(value, dtype=getattr(torch, dtype)).expand(shape)
    return state | (schedule() if kind in ("base", "film") else {})


def schedule() -> dict[str, Tensor]:
    """Buffers of the noise schedule that every file holds; of those that nobody reads only the names are right."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    names = [
        "logvar", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    ]
    return {"betas": betas.float()} | {name: torch.zeros(1000) for name in names}


def save(state: dict[str, Tensor], path: Path) -> Path:
    """A `.pth` with these tensors. Returns its path."""
    torch.save({"state_dict": state}, path)
    return path


# Published, without their weights


def layouts() -> dict[str, dict[str, tuple[list[int], str]]]:
    """{checkpoint: {name: (shape, dtype)}} of five published checkpoints."""
    return json.loads(lzma.decompress((DATA / "layouts.json.xz").read_bytes()))


def layout_state(layout: dict[str, tuple[list[int], str]]) -> dict[str, Tensor]:
    """Tensors of these names, shapes and dtypes that hold one number each: full size, no memory."""
    state = {
        name: torch.ones((), dtype=getattr(torch, dtype)).expand(shape) for name, (shape, dtype) in layout.items()
    }
    return state | {"betas": schedule()["betas"]}


# Made from hub parts


def state(**modules: nn.Module) -> dict[str, Tensor]:
    """The weights of modules of diffusers (`unet`, `vae`) and transformers (`vocoder`) under the authors' names."""
    rename = {"unet": unet_name, "vae": vae_name, "vocoder": vocoder_name}
    tensors = schedule() | {"scale_factor": torch.tensor(0.5)}
    for part, module in modules.items():
        names = module.state_dict()
        sizes = _sizes(names)
        for name, tensor in names.items():
            theirs = rename[part](name, sizes)
            if theirs is not None:
                if part == "vae" and re.search(r"attn_1\.(q|k|v|proj_out)\.weight", theirs):
                    tensor = tensor[:, :, None, None]
                tensors[PARTS[part] + theirs] = tensor
    return tensors


def _sizes(names: dict[str, Tensor]) -> dict[str, int]:
    """Highest number + 1 at each place of the names that a number of the authors' names is computed from."""
    patterns = {
        "layers": r"down_blocks\.0\.resnets\.(\d+)", "kinds": r"mid_block\.attentions\.(\d+)",
        "levels": r"decoder\.up_blocks\.(\d+)", "attending": r"up_blocks\.(\d+)\.attentions",
    }
    return {
        size: 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)
        for size, pattern in patterns.items()
    }


def unet_name(name: str, sizes: dict[str, int]) -> str:
    """diffusers' name of a tensor in the UNet -> the authors'."""
    layers, kinds = sizes["layers"], sizes["kinds"]
    inside = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        side, level, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        layer, j = (place, 0) if kind == "resnets" else (place // kinds, 1 + place % kinds)
        block = f"input_blocks.{1 + level * (layers + 1) + layer}" if side == "down" else \
            f"output_blocks.{level * (layers + 1) + layer}"
        if kind == "resnets":
            module, _, leaf = rest.partition(".")
            rest = f"{inside[module]}.{leaf}"
        return f"{block}.{j}.{rest}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        level = int(match[1])
        j = 1 + kinds if level < sizes["attending"] else 1
        return f"output_blocks.{level * (layers + 1) + layers}.{j}.conv.{match[2]}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)\.(.*)", name):
        return f"middle_block.{int(match[1]) * (kinds + 1)}.{inside[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"mid_block\.attentions\.(\d+)\.(.*)", name):
        return f"middle_block.{int(match[1]) + 1}.{match[2]}"
    first, _, rest = name.rpartition(".")
    return {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "class_embedding": "film_emb",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    }[first] + f".{rest}"


def vae_name(name: str, sizes: dict[str, int]) -> str:
    """diffusers' name of a tensor in the VAE -> the authors'."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{sizes['levels'] - 1 - int(m[1])}", name)
    for pattern, theirs in {
        r"down_blocks\.(\d+)": r"down.\1",
        r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0": "mid.attn_1", r"resnets\.(\d+)": r"block.\1", r"conv_norm_out": "norm_out",
        r"downsamplers\.0": "downsample", r"upsamplers\.0": "upsample", r"conv_shortcut": "nin_shortcut",
        r"group_norm": "norm", r"to_([qkv])": r"\1", r"to_out\.0": "proj_out",
    }.items():
        name = re.sub(pattern, theirs, name)
    return name


def vocoder_name(name: str, sizes: dict[str, int]) -> str | None:
    """transformers' name of a tensor in the vocoder -> the authors', None for what their files do not hold."""
    return None if name in ("mean", "scale") else name.replace("upsampler.", "ups.")


# Text encoders whose number of heads can be told from their widths, as in the published checkpoints


def clap(seed: int = 3) -> transformers.ClapModel:
    """CLAP with heads of 64 channels in its text branch, and the layer norms of RoBERTa."""
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 96, "max_position_embeddings": 80, "projection_dim": 64, "pad_token_id": 1,
            "layer_norm_eps": 1e-5, "type_vocab_size": 1,
        },
        audio_config={
            "window_size": 4, "num_mel_bins": 64, "depths": [2, 2], "num_attention_heads": [1, 2],
            "num_hidden_layers": 2, "hidden_size": 64, "patch_embeds_hidden_size": 32, "projection_dim": 64,
            "patch_size": 4, "patch_stride": [4, 4],
        },
        projection_dim=64,
    )
    return checkpoints.randomise(transformers.ClapModel(config), seed)


def gpt2(seed: int = 5, max_new_tokens: int = 8) -> transformers.GPT2Model:
    """GPT-2 with two heads of 64 channels."""
    config = transformers.GPT2Config(vocab_size=16, n_positions=128, n_embd=128, n_layer=2, n_head=2)
    config.max_new_tokens = max_new_tokens
    return checkpoints.randomise(transformers.GPT2Model(config), seed)


def modules(kind: str) -> dict[str, nn.Module]:
    """The parts of a tiny checkpoint, by their names in a hub folder: "sound", "speech", "film" or "t5".

    Everything that the authors' files do not say is as in the published ones: 32 groups, heads of 32 and 64 channels,
    a vocoder with known kernels.
    """
    contexts = {"sound": [None, 128, 32], "speech": [None, 128], "film": [None, None], "t5": [None, 32]}[kind]
    film = {
        "class_embed_type": "simple_projection", "class_embeddings_concat": True,
        "projection_class_embeddings_input_dim": 64,
    }
    unet = checkpoints.unet(
        block_out_channels=(32, 64), cross_attention_dim=[contexts] * 2, attention_head_dim=(1, 2), norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(film if kind == "film" else {}),
    )
    parts = {
        "unet": unet, "vae": checkpoints.vae(block_out_channels=(32, 32, 32), norm_num_groups=32),
        "vocoder": checkpoints.vocoder(resblock_dilation_sizes=[[1, 3, 5]] * 2),
    }
    if kind != "t5":
        parts["text_encoder"] = clap()
    if kind in ("sound", "t5"):
        parts["text_encoder_2"] = checkpoints.t5()
    if kind == "speech":
        parts["text_encoder_2"] = checkpoints.vits()
    if kind in ("sound", "speech"):
        places = {"use_learned_position_embedding": True, "max_seq_length": 40} if kind == "speech" else {}
        projection = AudioLDM2ProjectionModel(64, 16 if kind == "speech" else 32, 128, **places)
        parts["projection_model"] = checkpoints.randomise(projection, 6)
        parts["language_model"] = gpt2(max_new_tokens=8 if kind == "sound" else 128 - 40 - 5)
    return parts


def whole_state(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of all `modules` under the authors' names."""
    second = parts.get("text_encoder_2")
    speaks = isinstance(second, transformers.VitsModel)
    return state(**{name: parts[name] for name in PARTS}) | text_state(
        clap=parts.get("text_encoder"), t5=None if speaks else second, vits=second if speaks else None,
        projection=parts.get("projection_model"), gpt2=parts.get("language_model"),
    )


def save_tokenizers(folder: Path, speech: bool = False) -> Path:
    """A folder with the tokenizers of CLAP and of T5 or the phonemes. Returns it."""
    folder.mkdir(exist_ok=True)
    checkpoints.roberta_tokenizer().save_pretrained(folder / "tokenizer")
    second = checkpoints.vits_tokenizer(folder) if speech else checkpoints.t5_tokenizer()
    second.save_pretrained(folder / "tokenizer_2")
    return folder


def text_state(
    clap: nn.Module | None = None, t5: nn.Module | None = None, vits: nn.Module | None = None,
    projection: nn.Module | None = None, gpt2: nn.Module | None = None,
) -> dict[str, Tensor]:
    """The weights of the text encoders under the authors' names: with GPT-2 the others are its inputs."""
    outer = "cond_stage_models.0."
    if gpt2 is None:
        return {f"{outer}model.{name}": tensor for name, tensor in (_clap(clap) if t5 is None else _t5(t5)).items()}
    state = {f"{outer}model.{name}": tensor for name, tensor in gpt2.state_dict().items()}
    state |= {f"{outer}{name}": tensor for name, tensor in _projection(projection).items()}
    state |= {f"{outer}cond_stage_models.0.model.{name}": tensor for name, tensor in _clap(clap).items()}
    state |= {f"clap.model.{name}": tensor for name, tensor in _clap(clap).items()}
    second = f"{outer}cond_stage_models.1."
    if vits is not None:
        positions = projection.state_dict()["learnable_positional_embedding"]
        return state | {f"{second}text_encoder.{name}": tensor for name, tensor in _vits(vits).items()} | {
            f"{second}learnable_positional_embedding": positions
        }
    for prefix in (second, "cond_stage_models.1."):
        state |= {f"{prefix}model.{name}": tensor for name, tensor in _t5(t5).items()}
    return state


def _t5(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _projection(model: nn.Module) -> dict[str, Tensor]:
    weights = model.state_dict()
    tokens = {
        theirs: torch.cat([weights[f"{ours}_embed"][None], weights[f"{ours}_embed_1"][None],
                           torch.zeros(30, len(weights[f"{ours}_embed"]))])
        for theirs, ours in (("start_of_sequence_tokens.weight", "sos"), ("end_of_sequence_tokens.weight", "eos"))
    }
    linear = {
        f"input_sequence_embed_linear.{i}.{leaf}": weights[f"{name}.{leaf}"]
        for i, name in enumerate(("projection", "projection_1")) for leaf in ("weight", "bias")
    }
    return tokens | linear


def _vits(model: nn.Module) -> dict[str, Tensor]:
    """The text encoder of a VitsModel."""
    state = {}
    for name, tensor in model.text_encoder.state_dict().items():
        for pattern, theirs in {
            r"embed_tokens": "emb", r"^project": "proj",
            r"layers\.(\d+)\.attention\.([qkv])_proj": r"attn_layers.\1.conv_\2",
            r"layers\.(\d+)\.attention\.out_proj": r"attn_layers.\1.conv_o",
            r"layers\.(\d+)\.attention": r"attn_layers.\1",
            r"layers\.(\d+)\.layer_norm\.weight": r"norm_layers_1.\1.gamma",
            r"layers\.(\d+)\.layer_norm\.bias": r"norm_layers_1.\1.beta",
            r"layers\.(\d+)\.final_layer_norm\.weight": r"norm_layers_2.\1.gamma",
            r"layers\.(\d+)\.final_layer_norm\.bias": r"norm_layers_2.\1.beta",
            r"layers\.(\d+)\.feed_forward": r"ffn_layers.\1",
        }.items():
            name = re.sub(pattern, theirs, name)
        state[name] = tensor[:, :, None] if ".conv_" in name and tensor.ndim == 2 else tensor
    return state


def _clap(model: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, theirs in {
            r"^text_model": "text_branch", r"^audio_model\.audio_encoder": "audio_branch", r"linear1": "0",
            r"linear2": "2", r"batch_norm": "bn0", r"layernorm_before": "norm1", r"layernorm_after": "norm2",
            r"(blocks\.\d+)\.attention\.self\.(relative\w+)": r"\1.attn.\2",
            r"(blocks\.\d+)\.attention\.output\.dense": r"\1.attn.proj",
            r"(blocks\.\d+)\.intermediate\.dense": r"\1.mlp.fc1", r"(blocks\.\d+)\.output\.dense": r"\1.mlp.fc2",
        }.items():
            name = re.sub(pattern, theirs, name)
        if match := re.fullmatch(r"(audio_branch\..*)\.attention\.self\.(query|key|value)\.(.*)", name):
            state.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        elif not name.endswith("token_type_ids"):
            state[name] = tensor
    extra = {"audio_branch.head.weight": torch.zeros(2, 2), "text_transform.sequential.0.weight": torch.zeros(2, 2)}
    return extra | {
        name: torch.cat([tensor[kind] for kind in ("query", "key", "value")]) if isinstance(tensor, dict) else tensor
        for name, tensor in state.items()
    }
