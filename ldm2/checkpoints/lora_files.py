"""LoRA files of other programs -> Adapter: of diffusers and peft, old and new, and of kohya's scripts.

Whatever is no plain LoRA is refused by its name: what is left out of an adapter is heard, and nobody learns why.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2 import weights
from ldm2.checkpoints.adapter import CONFIG, FILE, PARTS, Adapter, LowRank
from ldm2.fields import check_file, read_json, sha256_of, short
from ldm2.option_kinds import names_a_lora
from ldm2.options import is_number
from ldm2.runtime.device import dtype_name
from ldm2.settings import INSTANT

PEFT_CONFIG = "adapter_config.json"
# What a folder may hold: the first that is there counts. Those of peft have their rank and alpha in PEFT_CONFIG.
NAMES = ("adapter_model.safetensors", "adapter_model.bin", FILE, "pytorch_lora_weights.bin")

# Names of tensors, and the module and side that they mean. `alpha` is a number for a module.
SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
LAYOUTS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.weight"),             # peft
    re.compile(r"(?P<module>.+?)(?:\.processor)?\.(?P<leaf>to_[qkv]|to_out)_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?:lora\.|lora_linear_layer\.|lora_)(?P<side>down|up)\.weight"),        # and kohya
    re.compile(r"(?P<module>.+)\.(?P<side>alpha)"),
)
# What else is found in such files.
OTHERS = {
    r"lokr_": "LoKr", r"hada_": "LoHa", r"dora_scale|lora_magnitude_vector": "DoRA", r"ia3_": "IA3",
    r"lora_mid|\.cp\b": "a LoRA with a Tucker decomposition", r"\boft_|\bboft_": "OFT", r"vera_lambda": "VeRA",
    r"lora_embedding_": "a LoRA of an embedding", r"\.diff(?:_b)?$": "whole differences of weights",
    r"\.[ab][12]\.weight$": "GLoRA", r"[wb]_norm$": "a change of norms", r"\bbias$": "a LoRA with biases",
    r"custom_diffusion": "Custom Diffusion",
}
ADAPTERS = r"lora_|\.lora\.|_lora\.|lokr_|hada_|ia3_|dora_scale|\boft_"     # in the names of a file that no model has
# What peft's configuration may ask for beside a plain LoRA, by its fields; refused where they are set.
VARIANTS = {
    "use_dora": "DoRA", "lora_bias": "a LoRA with biases", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA", "layer_replication": "replicated layers", "arrow_config": "Arrow",
    "target_parameters": "a LoRA of parameters", "trainable_token_indices": "trained tokens",
    "modules_to_save": "whole modules", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")   # which change the weights that they are added to
WORDS = r"[\w.^\\]+"                                       # of a pattern that is a name
MAKING = f"make it by `ldm2 train distill -o OUT --model ...`, then give --preset {INSTANT} --lora OUT"
LONGEST_PATTERN = 300                                      # characters


@dataclass(frozen=True)
class File:
    """Where an adapter lies: the file of its tensors, and the configuration beside it or None."""

    tensors: Path
    config: Path | None = None

    @classmethod
    def at(cls, path: str | Path) -> File:
        """What is at a path: a file, or a folder of peft or diffusers. Raises ValueError or OSError."""
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"the LoRA {path} does not exist")
        config = path / PEFT_CONFIG if path.is_dir() else path.with_name(PEFT_CONFIG)
        if path.is_dir():
            found = [path / name for name in NAMES if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(f"{path} holds no LoRA: none of {', '.join(NAMES)}")
            path = found[0]
        check_file(path)
        return cls(path, config if path.name in NAMES[:2] and config.is_file() else None)

    def digest(self) -> str:
        """SHA-256 of the tensors' file; with a configuration, of the digests of both."""
        both = [sha256_of(each) for each in (self.tensors, self.config) if each is not None]
        return both[0] if len(both) == 1 else hashlib.sha256("".join(both).encode()).hexdigest()

    def read(self) -> Adapter:
        """The adapter. Raises ValueError, one line that names the file, for a damaged one and for what is no LoRA."""
        header: Mapping[str, Any] = {}
        if self.tensors.suffix == ".safetensors":
            tensors = weights.read_safetensors(self.tensors)
            header = weights.read_header(self.tensors)
        else:
            tensors = dict(weights.read_tensors(self.tensors))
        config = self._config(header)
        if not tensors:
            raise ValueError(f"{self.tensors} is empty: it holds no LoRA")
        about = {name: value for name, value in header.items() if name not in (CONFIG, "format")}
        base = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
        about |= {"base_model_name_or_path": base} if isinstance(base, str) else {}
        return Adapter(_layers(tensors, config, str(self.tensors)), str(self.tensors), about)

    def _config(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """peft's configuration: of the folder, or of diffusers' header; empty without either."""
        if self.config is not None:
            config = read_json(self.config)
            kind = config.get("peft_type", "LORA")
            if kind != "LORA":
                raise ValueError(f"{self.config}: {short(kind)} is not supported, only LORA is")
            return config
        try:
            config = json.loads(header.get(CONFIG, "{}"))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"{self.tensors}: {CONFIG} in its header is not a JSON object")
        return config


def find(word: str, names: Mapping[str, Path]) -> File:
    """The file that a name (of those that there are) or a path stands for. Raises ValueError or OSError."""
    if word in names:
        return File.at(names[word])
    if names_a_lora(word) and not Path(word).exists():
        known = f"it has {', '.join(sorted(names))}" if names else "it has none"
        way = MAKING if word == INSTANT else "a file is given by its path"
        raise ValueError(f"this model has no LoRA named {word!r}: {known}; {way}")
    return File.at(word)


def read(path: str | Path) -> Adapter:
    """The LoRA in a file or a folder: diffusers', peft's or kohya's. Raises ValueError or OSError, one line."""
    return File.at(path).read()


def is_lora(path: str | Path) -> bool:
    """Whether a folder, or a file of tensors, is one of an adapter of any kind and no checkpoint's."""
    path = Path(path).expanduser()
    if path.is_dir():
        return not (path / "model_index.json").exists() and any((path / name).is_file() for name in NAMES)
    if path.suffix != ".safetensors":
        return False
    return any(re.search(ADAPTERS, name) for name in weights.read_safetensors(path))


def _layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, LowRank]:
    """Tensors by their names in the file -> layers by part and module. Raises ValueError."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, side = _place(key, source)
        if found.setdefault(_part(module, source), {}).setdefault(side, tensor) is not tensor:
            raise ValueError(f"{source}: {key} is a second {side} of {module}")
    configs = {part: _checked(_of_part(config, part), source) for part in PARTS}
    layers = {}
    for name, sides in sorted(found.items()):
        part, _, module = name.partition(".")
        down, up = _pair(name, sides, source)
        layers[name] = LowRank(down, up, _scale(module, down.shape[0], sides.get("alpha"), configs[part], source))
    return layers


def _place(key: str, source: str) -> tuple[str, str]:
    """A name in a file -> the module, and "down", "up" or "alpha"."""
    for pattern, name in OTHERS.items():
        if re.search(pattern, key):
            raise ValueError(f"{source}: {key} is of {name}, which is not supported: only plain LoRA is")
    match = next((match for layout in LAYOUTS if (match := layout.fullmatch(key))), None)
    if match is None:
        raise ValueError(f"{source}: {key} is not of a LoRA")
    leaf = match.groupdict().get("leaf")
    module = match["module"] if leaf is None else f"{match['module']}.{leaf.replace('to_out', 'to_out.0')}"
    return module, SIDES.get(match["side"], match["side"])


def _part(module: str, source: str) -> str:
    """The name of a module with that of its part in front."""
    name = module.removeprefix("base_model.model.")
    if name.startswith("lora_unet_"):
        return f"unet.{name.removeprefix('lora_unet_')}"
    part, _, rest = name.partition(".")
    if part not in PARTS:
        part, rest = next((part for part, start in STARTS.items() if re.match(start, name)), ""), name
    if not part:
        raise ValueError(f"{source} is a LoRA of another model: {module} is in no part that can have one "
                         f"({', '.join(PARTS)})")
    rest = rest.removeprefix("base_model.model.")
    return f"{part}.{rest.removeprefix('transformer.') if part == 'language_model' else rest}"


# How the names of modules begin in a part, for files that do not name it.
STARTS = {
    "unet": r"(?:down_blocks|mid_block|up_blocks|time_embedding|class_embedding)\.|conv_in$|conv_out$|class_embedding$",
    "language_model": r"(?:transformer\.)?h\.\d+\.",
    "projection_model": r"projection(?:_1)?$",
}


def _pair(name: str, sides: Mapping[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """The two matrices of a layer, which fit each other. Raises ValueError."""
    for side in ("down", "up"):
        if side not in sides:
            raise ValueError(f"{source}: {name} has no {side} matrix")
        tensor = sides[side]
        if tensor.dtype not in weights.FLOATS or tensor.layout != torch.strided or tensor.dim() < 2:
            kind = dtype_name(tensor.dtype)
            raise ValueError(f"{source}: {name} has a {side} matrix of {kind} {tuple(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite numbers: the file is damaged")
    down, up = sides["down"], sides["up"]
    if up.shape[1] != down.shape[0] or up[0, 0].numel() != 1 or not down.numel():
        raise ValueError(f"{source}: the matrices of {name} do not fit each other: {tuple(up.shape)} times "
                         f"{tuple(down.shape)}")
    return down.clone(), up.clone()                        # the file may be written anew while they are in use


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The fields for one part: those with its name in front, else all without any."""
    own = {name.removeprefix(f"{part}."): value for name, value in config.items() if name.startswith(f"{part}.")}
    return own or {name: value for name, value in config.items() if not name.startswith(tuple(f"{p}." for p in PARTS))}


def _checked(config: dict[str, Any], source: str) -> dict[str, Any]:
    """peft's configuration of a part, if it is that of a plain LoRA. Raises ValueError."""
    for field, name in VARIANTS.items():
        if config.get(field):
            raise ValueError(f"{source}: {name} ({field}) is not supported, only plain LoRA is")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source}: a LoRA with biases (bias {short(config['bias'])}) is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        raise ValueError(f"{source}: {init} changes the weights that the LoRA is added to: save it as a plain one "
                         "(path_initial_model_for_weight_conversion of peft's save_pretrained)")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping) or not all(_is_finite(value) for value in alphas.values()):
        raise ValueError(f"{source}: alpha_pattern must hold numbers, got {short(alphas)}")
    if "lora_alpha" in config and not _is_finite(config["lora_alpha"]):
        raise ValueError(f"{source}: lora_alpha must be a number, got {short(config['lora_alpha'])}")
    return config


def _scale(module: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any], source: str) -> float:
    """alpha / r, or with rank-stabilized scaling (arXiv:2312.03732) alpha / sqrt(r); 1 where nothing is said."""
    told = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if _matches(pattern, module, source):
            told = value
            break
    if told is not None:
        return told / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise ValueError(f"{source}: the alpha of {module} must be one finite number, got {short(alpha.tolist())}")
    return float(alpha) / rank


def _matches(pattern: str, module: str, source: str) -> bool:
    """Whether a key of peft's patterns is for a module: a name or the end of one, or a regular expression."""
    if re.fullmatch(WORDS, pattern):
        name = pattern.replace("\\.", ".")
        return module == name.removeprefix("^") or (name[0] != "^" and module.endswith(f".{name}"))
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise re.error(f"{len(pattern)} characters")
        return re.match(rf"(?:.*\.)?(?:{pattern})$", module) is not None
    except re.error as error:
        raise ValueError(f"{source}: alpha_pattern {short(pattern)} is no pattern ({error})") from None


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
