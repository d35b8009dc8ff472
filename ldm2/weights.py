"""Read weight files and put them into modules, strictly.

    with weights.parameters_on_meta():
        unet = UNet(config)                                     # no memory, no initialisation
    weights.load(unet, weights.read_tensors(folder / "unet"), dtype=torch.bfloat16)

Tensors are memory-mapped: float32 weights of a CPU model are never copied, other precisions are cast one tensor at a
time. Pickle files are read with `weights_only=True`, never otherwise.
"""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
Table = Mapping[str, "str | None"]

# Names that older versions of the libraries wrote, for every part of a hub folder: {regular expression: new name}.
# None means dropped on purpose: tables that are computed, not learned.
OLD_NAMES: Table = {
    r"(?:.*\.)?position_ids": None,
    r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias": None,  # causal mask of GPT-2
    r"(.*\.attentions\.\d+)\.query\.(weight|bias)": r"\1.to_q.\2",  # VAE attention before diffusers 0.18
    r"(.*\.attentions\.\d+)\.key\.(weight|bias)": r"\1.to_k.\2",
    r"(.*\.attentions\.\d+)\.value\.(weight|bias)": r"\1.to_v.\2",
    r"(.*\.attentions\.\d+)\.proj_attn\.(weight|bias)": r"\1.to_out.0.\2",
}


# Finding the files of one part


def weight_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """Weight files of one part of a checkpoint, safetensors before pickles, shards in the order of their index.

    `variant` is the word in names such as model.fp16.safetensors. Raises ValueError if there is no such file, if a
    shard is missing, or if the index cannot be read.
    """
    folder = Path(folder)
    infix = f".{variant}" if variant else ""
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            single = folder / f"{stem}{infix}{suffix}"
            if single.is_file():
                return [single]
            index = folder / f"{stem}{suffix}.index{infix}.json"
            if index.is_file():
                return _shards(index)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = " or ".join(f"{stem}{infix}.safetensors" for stem in STEMS[:2])
    raise ValueError(f"{folder} holds no weights: expected {wanted} (or .bin), found {found}")


def _shards(index: Path) -> list[Path]:
    """Files named by `*.index.json`, each once."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [index.parent / name for name in dict.fromkeys(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weight files: it needs an object 'weight_map'") from error
    for path in paths:
        if path.parent != index.parent:
            raise ValueError(f"{index} names {path}, which is outside its folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing: {index.name} names it as one of {len(paths)} shards")
    return paths


# Reading


def read_tensors(folder: str | Path, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of one part, memory-mapped, under the names in the files. `folder` may also be a weight file itself.

    Raises ValueError, one line that names the file, if a file is missing, truncated, of another kind, or a pickle that
    holds anything but tensors.
    """
    path = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path, variant):
        part = read_safetensors(file) if file.suffix == ".safetensors" else _flat(read_pickle(file), file)
        twice = tensors.keys() & part.keys()
        if twice:
            raise ValueError(f"{file} repeats {_few(sorted(twice))} of another shard")
        tensors.update(part)
    return tensors


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, memory-mapped."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is {_kind(path)}, not a complete safetensors file ({_one_line(error)})") from error


def read_pickle(path: str | Path) -> object:
    """What a `.bin`, `.pth` or `.ckpt` file holds: tensors (memory-mapped where the format allows) in plain containers.

    Nothing in the file is run: a file that asks for anything else is a ValueError.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # older files are one pickle after another, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is {_kind(path)}, not a pickle of plain tensors; nothing of it was run") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is {_kind(path)}, not a complete pickle of tensors ({_one_line(error)})") from error


def _flat(content: object, path: Path) -> dict[str, Tensor]:
    """`content` if it is a dict of named tensors, or the dict of them under 'state_dict'."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} is not a dict of named tensors")
    return dict(content)


def _kind(path: str | Path) -> str:
    """What a file that could not be read seems to be, for the error message."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return "not readable"
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (run `git lfs pull`)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    return "damaged or of another kind"


# Names


def rename(
    tensors: Mapping[str, Tensor], table: Table, *, source: str | Path, keep_others: bool = False
) -> dict[str, Tensor]:
    """Tensors under new names, after a table {regular expression: replacement}.

    The first row that matches the whole name wins; a replacement may use its groups; None drops the tensor on purpose.
    A name that no row matches is a ValueError, unless `keep_others`. So are two tensors that end under one name.
    """
    rows = [(re.compile(pattern), replacement) for pattern, replacement in table.items()]
    renamed: dict[str, Tensor] = {}
    unmatched = []
    for name, tensor in tensors.items():
        row = next(((match, new) for pattern, new in rows if (match := pattern.fullmatch(name))), None)
        if row is None:
            if not keep_others:
                unmatched.append(name)
                continue
            new_name = name
        elif row[1] is None:
            continue
        else:
            new_name = row[0].expand(row[1])
        if new_name in renamed:
            raise ValueError(f"{source}: {name} would be a second {new_name}")
        renamed[new_name] = tensor
    if unmatched:
        raise ValueError(f"{source}: {len(unmatched)} unknown keys ({_few(unmatched)})")
    return renamed


# Building and filling


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory; buffers are real, since no file fills some of them."""
    builder = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != builder:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = nn.modules.module.register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def load(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    table: Table = OLD_NAMES,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    source: str | Path = "checkpoint",
) -> nn.Module:
    """Assign tensors to the parameters and persistent buffers of `module`: all of them, and no others.

    The tensors become the parameters themselves (no copy), on `device` and, where they are floating, in `dtype`; None
    keeps what the file has. Parameters that the module ties are filled from whichever of their names the file has. What
    `table` drops is not expected either: such a buffer keeps the value it was built with. Returns the module, in eval
    mode, without gradients. Raises ValueError if names or shapes differ, listing the first few, before it assigns any.
    """
    tensors = rename(tensors, table, source=source, keep_others=True)
    groups = _groups(module, table)
    _check(groups, tensors, source)
    for names, target in groups:
        tensor = tensors[next(name for name in names if name in tensors)]
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        value = nn.Parameter(tensor, requires_grad=False) if isinstance(target, nn.Parameter) else tensor
        for name in names:
            _assign(module, name, value)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise RuntimeError(f"no file fills the buffer {name}: build the module under parameters_on_meta()")
        if device is not None:
            _assign(module, name, buffer.to(device))
    return module.eval()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def _groups(module: nn.Module, table: Table) -> list[tuple[list[str], Tensor]]:
    """Names and present value of every parameter and persistent buffer to fill; tied ones share an entry."""
    dropped = [re.compile(pattern) for pattern, replacement in table.items() if replacement is None]
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, target in module.state_dict(keep_vars=True).items():
        if isinstance(target, nn.Parameter) or not any(pattern.fullmatch(name) for pattern in dropped):
            groups.setdefault(id(target), ([], target))[0].append(name)
    return list(groups.values())


def _check(groups: list[tuple[list[str], Tensor]], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError unless `tensors` fill every group, with its shape, and nothing else."""
    missing = [names[0] for names, _ in groups if not any(name in tensors for name in names)]
    known = {name: target for names, target in groups for name in names}
    unexpected = [name for name in tensors if name not in known]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(known[name].shape)}"
        for name, tensor in tensors.items()
        if name in known and tensor.shape != known[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_few(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {', '.join(problems)}")


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
