"""Kernels for the CPU: where they are, linear layers and attention; convolutions are in `cpu_convolutions`.

The operators are C++ (`kernels/csrc`), built by `python -m ldm2.build_kernels` and found here; importing this builds
nothing. They are for inference, in float32 and bfloat16. The error of float32 linear layers
against float64 is larger than that of plain ones, but stays below 3e-6 of the root mean square of the result.

The best instruction set of the machine is used. The environment variable LDM2_CPU_ISA, read when the library is loaded,
masks those above the one that it names: baseline, avx2, avx512, avx512_bf16 or zen4. One that the machine lacks is
never used, whatever is named. PyTorch has variables of its own for the same (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_PANEL = 16                                                # channels come in multiples of this (kernels.h)
_FEWEST_ROWS = 24                                          # of a linear layer or attention; below, PyTorch is as fast
_DEEPEST = 1 << 16                                         # inputs of a layer of integers (kernels.h)


def sources() -> Path:
    """The folder of the C++ sources: beside this package in a checkout, inside it where installed."""
    inside = _HERE / "csrc"
    return inside if inside.is_dir() else _HERE.parent / "csrc"


@functools.cache
def library_name() -> str:
    """File name of the library that fits this PyTorch, this kind of machine and these sources."""
    digest = hashlib.sha256()
    for file in sorted(sources().iterdir()):
        digest.update(file.read_bytes())
    return f"ldm2_cpu-{platform.machine()}-torch{torch.__version__}-{digest.hexdigest()[:12]}.so"


def folders() -> list[Path]:
    """Where libraries may lie, in order of preference: this package, then the user's cache.

    As its specification asks, an XDG_CACHE_HOME that is empty or relative counts as not set.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return [_HERE, (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "ldm2"]
    except RuntimeError:                                   # there is no home
        return [_HERE]


def library() -> Path | None:
    """The built library that fits and can be trusted, links resolved; None if there is none.

    It is code that runs in this process. So it must be a file that no other user could write, in a folder of which the
    same is true, and what `python -m ldm2.build_kernels` wrote there: its digest lies beside it.
    """
    for folder in folders():
        path = folder / library_name()
        if not path.is_file():
            continue
        # Whoever can write to the folder of this package can change this very code.
        obstacle = distrust(path, above=folder != _HERE) or _damage(path)
        if obstacle is None:
            return path.resolve()
        logger.warning("%s is not used: %s", path, obstacle)
    return None


def distrust(path: Path, above: bool = True) -> str | None:
    """Why somebody else may have written what is at `path`, in words; None if nobody can have.

    It, with `above` also each folder above it, must belong to this user, to root or to the owner of this package, and
    nobody else may write to it. A folder in which everybody can only change his own files (as in /tmp) will do above.
    """
    if not hasattr(os, "geteuid"):                         # Windows keeps a user's cache to the user
        return None
    if not path.is_absolute():
        return f"{path} is not an absolute path"
    owners = {0, os.geteuid(), _HERE.stat().st_uid}
    places = {path: None, path.resolve(): None}
    if above:
        places |= dict.fromkeys(folder for place in list(places) for folder in place.parents)
    for place in places:
        facts = place.lstat()
        if facts.st_uid not in owners:
            return f"{place} belongs to another user"
        if stat.S_ISLNK(facts.st_mode):
            continue                                       # the folder that holds it counts, and where it leads
        own_group = facts.st_gid == os.getegid() == os.geteuid()             # a group of one, by convention
        shared = facts.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
        if shared and not (stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX and place != path.parent):
            return f"others can write to {place}"
    return None


def digest_file(library: Path) -> Path:
    """Where the digest of a library lies."""
    return library.with_name(f"{library.name}.sha256")


def _damage(path: Path) -> str | None:
    """What has happened to a library since it was built; None if nothing."""
    try:
        expected = digest_file(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return f"{digest_file(path).name} is missing: build it anew"
    return None if hashlib.sha256(path.read_bytes()).hexdigest() == expected else "it is damaged: build it anew"


def load() -> bool:
    """Registers the operators torch.ops.ldm2_cpu. False where no library is built.

    LDM2_KERNELS=auto builds it first, which takes a minute, into the user's cache. Raises ValueError if LDM2_CPU_ISA
    names no instruction set, or LDM2_KERNELS is anything else.
    """
    path = library() or _built_if_asked()
    if path is None:
        return False
    torch.ops.load_library(path)
    torch.ops.ldm2_cpu.instruction_sets()                  # reads LDM2_CPU_ISA
    return True


def release_memory() -> None:
    """Idle memory of large results goes back to the system now, not half a minute after it was last needed.

    It serves later results until then: filling a fresh page with zeros costs about as much as the work on it.
    """
    torch.ops.ldm2_cpu.release_memory()


def _built_if_asked() -> Path | None:
    """The library, built now if LDM2_KERNELS says so; None if it does not, or with a warning if that fails."""
    asked = os.environ.get("LDM2_KERNELS", "")
    if asked not in ("", "auto"):
        raise ValueError(f"LDM2_KERNELS must be auto or not set, got {asked!r}")
    if not asked:
        return None
    from ldm2_kernels.build import build

    try:
        return build(folders()[-1])
    except (ValueError, OSError) as error:
        logger.warning("LDM2_KERNELS=auto, but the kernels cannot be built (%s): plain PyTorch takes over", error)
        return None


def _bfloat16() -> str:
    """What this machine has for it: "matrices" (AMX, many times as fast as float32), "products" (AVX-512, twice) or "".

    Matrices are above all that LDM2_CPU_ISA can name.
    """
    if torch.ops.ldm2_cpu.instruction_sets()[0] not in ("avx512_bf16", "zen4"):
        return ""
    matrices = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16") and not os.environ.get("LDM2_CPU_ISA")
    return "matrices" if matrices else "products"


# For torch.compile, as `torch.compiler.assume_constant_result` does, which would import torch._dynamo, for a second.
_bfloat16._dynamo_marked_constant = True


def _kernel(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel for float32 and bfloat16, the latter not where the machine has matrices: PyTorch is faster there."""

    @functools.wraps(operation)
    def run(*args, **named):
        dtype = args[0].dtype
        if dtype == torch.float16 or (dtype == torch.bfloat16 and _bfloat16() == "matrices"):
            return NotImplemented
        return operation(*args, **named)

    return run


def _plain(operation: Callable[..., Tensor], *args: object, **named: object) -> Tensor:
    """PyTorch's own, in float32 where the machine has nothing for bfloat16: that is faster."""
    widen = args[0].dtype == torch.bfloat16 and not _bfloat16()
    return _by_float32(operation, *args, **named) if widen else operation(*args, **named)


def _by_float32(operation: Callable[..., Tensor], *args: object, **named: object) -> Tensor:
    """What the operation makes of bfloat16 tensors, rounded once."""
    return operation(*map(_wide, args), **{name: _wide(arg) for name, arg in named.items()}).to(torch.bfloat16)


def _wide(arg: object) -> object:
    return arg.float() if isinstance(arg, Tensor) else arg


def _parts(weight: Any) -> tuple[Tensor, Tensor | None]:
    """The numbers of a weight, and the scales of its output channels where it is an `Int8` of `ldm2.ops`."""
    return (weight, None) if isinstance(weight, Tensor) else weight


def rounds_inputs(weight: Any) -> bool:
    """Whether a weight is a `W8A8` of `ldm2.ops`."""
    return not isinstance(weight, Tensor) and weight.rounds_inputs


def _dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight as PyTorch takes it."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


@_kernel
def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """The weights are laid out for the product in cache, a piece at a time."""
    return _linear(x, weight, bias)


@_kernel
def linear_geglu(x: Tensor, weight: Any, bias: Tensor) -> Tensor:
    """What the gates multiply, and the gates, never leave the cache."""
    values, scale = _parts(weight)
    if rounds_inputs(weight):
        return _rounded(x, weight, bias, 2 * _PANEL, gated=True)
    if not _has_panels(x, values, 2 * _PANEL):
        value, gate = _plain(F.linear, x, _dense(weight, x.dtype), bias).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
    return torch.ops.ldm2_cpu.linear(x, values, bias, True, scale)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Block by block with a running softmax; sums, and the softmax, in float32."""
    batch, _, queries, width = q.shape
    plain = bias is None or bias.shape in ((1, 1, 1, k.shape[2]), (batch, 1, 1, k.shape[2]))
    rows = all(tensor.stride(3) == 1 and tensor.stride(2) % 2 == 0 for tensor in (q, k, v))
    if q.dtype == torch.float16 or width % _PANEL or not plain or not rows:
        return NotImplemented
    if not _enough(queries, _FEWEST_ROWS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if q.dtype == torch.bfloat16 and not _bfloat16():
        return _by_float32(torch.ops.ldm2_cpu.attention, q, k, v, bias)
    return torch.ops.ldm2_cpu.attention(q, k, v, bias)


@_kernel
def absorbed_attention(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """Masked positions at the end of an image take no part; keys and values are taken as they lie in memory."""
    if not takes_absorbed(x, keys, bias) or len(x) != len(keys):
        return NotImplemented
    return _plain(torch.ops.ldm2_cpu.absorbed_attention, x, keys, values, bias, offset)


def takes_absorbed(x: Tensor, keys: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes attention of x (B, N, C) to keys (B', H, L, C), B' a multiple of B."""
    rows, heads, length, channels = keys.shape
    plain = bias is None or bias.shape in ((1, 1, 1, length), (rows, 1, 1, length))
    even = x.dtype == torch.float32 or heads * length % 2 == 0
    return plain and even and channels % _PANEL == 0


def _linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    values, scale = _parts(weight)
    if rounds_inputs(weight):
        return _rounded(x, weight, bias, _PANEL, gated=False)
    if not _has_panels(x, values, _PANEL):
        return _plain(F.linear, x, _dense(weight, x.dtype), bias)
    return torch.ops.ldm2_cpu.linear(x, values, bias, False, scale)


def _rounded(x: Tensor, weight: Any, bias: Tensor | None, unit: int, gated: bool) -> Tensor:
    """A linear layer of integers of 8 bits. What the kernel does not take is left to the definition."""
    if weight.values.shape[0] % unit or weight.values.shape[1] > _DEEPEST:
        return NotImplemented
    return torch.ops.ldm2_cpu.linear_int8(x, weight.values, weight.scale, bias, gated)


def _has_panels(x: Tensor, weight: Tensor, unit: int) -> bool:
    """Whether the linear kernel takes these, and is faster than PyTorch: `unit` output channels are made together.

    With weights of bytes, which PyTorch would first have to widen, it always is.
    """
    outs, ins = weight.shape
    fits = outs % unit == 0 and (x.dtype == torch.float32 or ins % 2 == 0)
    return fits and (weight.dtype == torch.int8 or _enough(x.numel(), _FEWEST_ROWS * ins))


def _enough(count: int, fewest: int) -> bool:
    """Whether a kernel pays. A compiled model does not ask: it is for inputs of any size."""
    return torch.compiler.is_compiling() or count >= fewest
