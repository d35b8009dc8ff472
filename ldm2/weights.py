"""Read weight files and put them into modules, strictly.

    with weights.on_meta():
        unet = UNet(config)                                     # no memory, no initialisation
    weights.load(unet, weights.read_tensors(folder / "unet"), dtype=torch.bfloat16)

Tensors are memory-mapped: float32 weights of a CPU model are never copied, other precisions are cast one tensor at a
time, and what was cast is let go. Pickle files are read with `weights_only=True`, never otherwise.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm2.checkpoints import int8, pickle_file
from ldm2.checkpoints.hub_folder import weight_files
from ldm2.fields import check_file, few, first_line, named
from ldm2.ops import Int8, Weight, dense
from ldm2.runtime import finite, int8_layers
from ldm2.runtime.device import computing_dtype, dtype_name

logger = logging.getLogger(__name__)

Table = Mapping[str, "str | None"]
Module = TypeVar("Module", bound=nn.Module)
Value = TypeVar("Value")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SMALL = 64_000_000                                         # bytes of a part that are looked through in no time
REMAP_BYTES = 128_000_000                                      # bytes of a file that are mapped at once to be copied

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


# Reading


def read_tensors(folder: str | Path, variant: str | None = None, to_copy: bool = False) -> Mapping[str, Tensor]:
    """All tensors of one part, memory-mapped, under the names in the files. `folder` may also be a weight file itself.

    to_copy: they will be copied: do not keep in memory what was copied, see `RemappingTensors` (safetensors only).
    Raises ValueError, one line that names the file, if a file is missing, truncated, of another kind, or a pickle that
    holds anything but tensors.
    """
    path = Path(folder)
    tensors: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for file in weight_files(path, variant) if path.is_dir() or not path.exists() else [path]:
        part = read_safetensors(file) if file.suffix == ".safetensors" else _flat(read_pickle(file), file)
        twice = tensors.keys() & part.keys()
        if twice:
            raise ValueError(f"{file} repeats {few(sorted(twice))} of another shard")
        tensors.update(part)
        places.update(dict.fromkeys(part, file))
    if to_copy and all(file.suffix == ".safetensors" for file in places.values()):
        return RemappingTensors(places)
    return tensors


class RemappingTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files (name -> file), mapped when they are asked for.

    A mapped page counts as memory from when it is read until the whole mapping goes. So the file is mapped anew after
    each REMAP_BYTES bytes: whoever takes the tensors in their order and keeps none holds no more than that.
    """

    def __init__(self, places: Mapping[str, Path]):
        self._places = places
        self._path: Path | None = None
        self._file: Any = None                             # of safetensors, which is typed as a context manager alone
        self._served = 0

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        if path != self._path or self._served > REMAP_BYTES:
            self._path, self._served = path, 0
            self._file = safe_open(str(path), framework="pt", device="cpu")
        tensor = self._file.get_tensor(name)
        self._served += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, memory-mapped."""
    check_file(Path(path))
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is {_kind(path)}, not a complete safetensors file ({first_line(error)})") from error


def read_header(path: str | Path) -> dict[str, str]:
    """The words in the header of a safetensors file that `read_safetensors` has read."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        return file.metadata() or {}


def read_pickle(path: str | Path) -> object:
    """What a `.bin`, `.pth` or `.ckpt` file holds: tensors (memory-mapped where the format allows) in plain containers.

    Nothing in the file is run: a file that asks for anything else is a ValueError, except for what training frameworks
    leave beside the tensors, which is not read.
    """
    check_file(Path(path))
    try:
        return pickle_file.read(path)
    except pickle_file.Forbidden as error:
        what = f"{path} is" if error.name else f"{path} is {_kind(path)},"
        way_out = f". {_save_alone(Path(path), error.name)}" if error.name else ""
        raise ValueError(f"{what} not a pickle of plain tensors; nothing of it was run{way_out}") from error
    except pickle_file.DAMAGED as error:
        raise ValueError(f"{path} is {_kind(path)}, not a complete pickle of tensors ({first_line(error)})") from error


def _save_alone(path: Path, name: str) -> str:
    """What is in the way in a pickle, and the line with which who trusts it can save its tensors without it."""
    tensors = f"torch.load({path.name!r}, weights_only=False)['state_dict']"
    line = f"import torch; torch.save({{'state_dict': {tensors}}}, 'new.pth')"
    return f'It asks for {name}; if you trust its maker, save the tensors alone: python -c "{line}"'


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
    tensors: Mapping[str, Value], table: Table, *, source: str | Path, keep_others: bool = False
) -> dict[str, Value]:
    """Tensors under new names, after a table {regular expression: replacement}.

    The first row that matches the whole name wins; a replacement may use its groups; None drops the tensor on purpose.
    A name that no row matches is a ValueError, unless `keep_others`. So are two tensors that end under one name.
    """
    rows = [(re.compile(pattern), replacement) for pattern, replacement in table.items()]
    renamed: dict[str, Value] = {}
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
        raise ValueError(f"{source}: {len(unmatched)} unknown keys ({few(unmatched)})")
    return renamed


# Building and filling


class _SkipInitialisation(TorchFunctionMode):
    """Filling a tensor without memory does nothing, yet takes most of the time of building a module."""

    FILLS = frozenset({
        "normal_", "uniform_", "zero_", "fill_",                                        # of Tensor
        "constant_", "zeros_", "ones_", "kaiming_uniform_", "xavier_uniform_",          # of torch.nn.init
    })

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", None) in self.FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside, in this thread, take neither memory nor time for their first values: all is on the meta
    device. Buffers that no file fills must be made by whoever builds the module; `load` raises where one is not."""
    with torch.device("meta"), _SkipInitialisation():
        yield


def load(
    module: Module,
    tensors: Mapping[str, Tensor],
    *,
    table: Table = OLD_NAMES,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    source: str | Path = "checkpoint",
) -> Module:
    """Assign tensors to the parameters and persistent buffers of `module`: all of them, and no others.

    The tensors become the parameters themselves (no copy), on `device` and, where they are floating, in `dtype`; None
    keeps what the file has, int8 makes large weights int8 and the others what such a model computes in. Int8 weights of
    a file become `dtype`. Parameters that the module ties are filled from whichever of their names the file has. What
    `table` drops is not expected either: such a buffer keeps the value that it has. Returns the module, in eval mode,
    without gradients. Raises ValueError if names, shapes or kinds of numbers differ, listing a few, before it assigns
    any, and for NaN and infinite numbers. Large mapped weights are not looked through for these here, but by
    `ldm2.runtime.finite`.
    """
    held = rename(int8.paired(tensors, source), table, source=source, keep_others=True)
    if logger.isEnabledFor(logging.DEBUG):
        given = list(tensors)
        logger.debug("%s: %d tensors, dropped on purpose: %s", source, len(given), _dropped(given, table))
    del tensors                                            # whose memory goes tensor by tensor
    groups = _groups(module, table)
    _check(groups, held, source)
    chosen = {next(name for name in names if name in held): (names, target) for names, target in groups}
    computing = computing_dtype(dtype)
    for name in [name for name in held if name in chosen]:                   # in the order of the file
        names, target = chosen[name]
        weight = _placed(name, held.pop(name), device, dtype, source)
        if isinstance(weight, Int8) and all(int8_layers.install(module, each, weight, computing) for each in names):
            continue
        tensor = dense(weight, computing)
        value = nn.Parameter(tensor, requires_grad=False) if isinstance(target, nn.Parameter) else tensor
        for name in names:
            assign(module, name, value)
    filled = {each for names, _ in groups for name in names for each in (name, name + int8.SCALE)}
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name not in filled:
            raise RuntimeError(f"no file fills the buffer {name}: whoever builds the module must")
        if device is not None:
            assign(module, name, buffer.to(device))
    finite.leave_unchecked(module, source)
    if sum(target.nbytes for _, target in groups) <= SMALL:
        finite.check_finite(module)
    return module.eval()


def _placed(
    name: str, weight: Weight, device: torch.device | str | None, dtype: torch.dtype | None, source: str | Path
) -> Weight:
    """A weight on its device, in its dtype, see `load`. On the meta device nothing is read.

    What int8 leaves floating is copied: a mapping would stay in memory as a whole.
    """
    placed: Weight
    if isinstance(weight, Int8):
        placed = Int8(weight.values.to(device=device), weight.scale.to(device=device, copy=True))
        if dtype == torch.int8:
            return placed
        placed = placed.dense(torch.float32 if dtype is None else dtype)
    elif dtype == torch.int8 and int8.selects(name, weight):
        with named(source):
            return int8.quantize(name, weight.to(device=device))
    else:
        kind = computing_dtype(dtype) if weight.is_floating_point() else None
        placed = weight.to(device=device, dtype=kind, copy=dtype == torch.int8)
    if placed is not weight:
        finite.check_tensor(placed, name, source)
    return placed


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def _dropped(names: list[str], table: Table) -> list[str]:
    """The names that `table` drops."""
    rows = [(re.compile(pattern), new) for pattern, new in table.items()]
    first = {name: next((new for pattern, new in rows if pattern.fullmatch(name)), name) for name in names}
    return [name for name, new in first.items() if new is None]


def _groups(module: nn.Module, table: Table) -> list[tuple[list[str], Tensor]]:
    """Names and present value of every parameter and persistent buffer to fill; tied ones share an entry."""
    dropped = [re.compile(pattern) for pattern, replacement in table.items() if replacement is None]
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, target in module.state_dict(keep_vars=True).items():
        if isinstance(target, nn.Parameter) or not any(pattern.fullmatch(name) for pattern in dropped):
            groups.setdefault(id(target), ([], target))[0].append(name)
    return list(groups.values())


def _check(groups: list[tuple[list[str], Tensor]], tensors: Mapping[str, Weight], source: str | Path) -> None:
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
        f"{len(names)} {kind} ({few(names)})"
        for kind, names in (
            ("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen),
            (f"not {_names(FLOATS)}", [name for name in tensors if name in known and _odd(tensors[name], known[name])]),
            ("different under two names", [names[0] for names, _ in groups if not _agree(tensors, names)]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {', '.join(problems)}")


def _odd(tensor: Weight, target: Tensor) -> bool:
    """Whether a tensor holds numbers of a kind that `target` cannot have: a parameter or table needs floating ones."""
    if isinstance(tensor, Int8):
        return not target.is_floating_point()
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if target.is_floating_point():
        return not plain or tensor.dtype not in FLOATS
    return not plain or tensor.dtype not in ((torch.bool,) if target.dtype == torch.bool else INTEGERS)


def _agree(tensors: Mapping[str, Weight], names: list[str]) -> bool:
    """Whether those of the tied `names` that a file holds are one tensor, or equal ones."""
    given = [tensors[name] for name in names if name in tensors]
    first, *others = [weight.values if isinstance(weight, Int8) else weight for weight in given] or [None]
    return all(
        other.data_ptr() == first.data_ptr() or other.shape != first.shape or torch.equal(other, first)
        for other in others
    )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(dtype_name(dtype) for dtype in dtypes)
