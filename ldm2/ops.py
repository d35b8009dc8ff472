"""The operations that models call by name, so that a faster implementation can take their place.

Each function here is the definition of correct: plain PyTorch, any device, any floating dtype, differentiable. Where
`ldm2_kernels` has a fused form of one for the device at hand, and no gradient is asked for, that one runs instead, with
the same arguments and result. `ops.geglu.reference` is always the plain one.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ldm2.fields import flat
from ldm2.runtime.device import dtype_name
from ldm2.runtime.int8_weights import W8A8 as W8A8
from ldm2.runtime.int8_weights import Int8, Weight, dense, product

try:
    import ldm2_kernels
except ModuleNotFoundError:                                # ldm2 runs from a folder without being installed
    ldm2_kernels = None

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "fused", "reference")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_backend: ContextVar[str] = ContextVar("backend", default="auto")
# By type of device, filled when an operation first runs there. None: PyTorch's own is the fused one.
_kernels: dict[str, dict[str, Callable | None]] = {}
# Types of devices whose kernels are tried before they are trusted: these have been run on few cards.
_TRIED_FIRST = {"cuda"}
# What is wrong with the kernel of an operation on a device in a dtype, None if nothing is; filled at its first use.
_faults: dict[tuple[str, torch.device, torch.dtype], str | None] = {}
_trying = threading.Lock()
HINTS = {"cuda": "it needs the package triton",
         "cpu": "build it with python -m ldm2.build_kernels, or set LDM2_KERNELS=auto"}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Which implementation the operations take inside the `with` block, in this thread or task.

    "auto" takes the fused one where there is one (on CUDA: that computes what it should when first tried there),
    "reference" plain PyTorch. "fused" raises RuntimeError at the first
    operation that would fall back, so that no measurement times the fallback. A compiled model keeps the choice that it
    was compiled under. Raises ValueError for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, choose from {', '.join(BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def asked() -> str:
    """The backend that holds here: one of BACKENDS."""
    return _backend.get()


def _constant(function: Any) -> Any:
    """Marks a function whose result torch.compile may take for a constant.

    As `torch.compiler.assume_constant_result` does, without the import of torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def _choice(name: str, device_type: str) -> tuple[bool, bool]:
    """(whether there is a kernel to try, whether falling back is an error)."""
    asked = _backend.get()
    if asked == "reference":
        return False, False
    if device_type not in _kernels:
        with _trying:                                      # loading may build them
            if device_type not in _kernels:
                _kernels[device_type] = _loaded(device_type)
    known = _kernels[device_type]
    native = name in known and known[name] is None
    return known.get(name) is not None, asked == "fused" and not native


def _loaded(device_type: str) -> dict[str, Callable | None]:
    """The kernels for a type of device; none, with a warning, where those that there are cannot be loaded."""
    try:
        return {} if ldm2_kernels is None else ldm2_kernels.load(device_type)
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("the kernels for %s cannot be loaded (%s): plain PyTorch takes over", device_type,
                       flat(error, 200))
        return {}


@_constant
def _trusted(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of an operation is known to compute what it should. At its first use in a process it is tried
    on small inputs; one that fails is reported once."""
    if device.type not in _TRIED_FIRST:
        return True
    key = name, device, dtype
    if key not in _faults:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True                                    # no time for trials
        with _trying:
            if key not in _faults:
                _faults[key] = _try(*key)
    return _faults[key] is None


def _try(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel, told in a warning; None if nothing is."""
    with ThreadPoolExecutor(1) as elsewhere:               # a thread has none of the modes that hold here: tracing, ...
        found = elsewhere.submit(_fault, name, device, dtype).result()
    if found is not None:
        logger.warning("the fused %s does not work on this %s in %s (%s): plain PyTorch takes over", name, device.type,
                       dtype_name(dtype), found)
    return found


def _fault(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    from ldm2_kernels.check import verdict

    with backend("reference"):                             # which may be made of other operations
        return verdict(name, _kernels[device.type][name], globals()[name].reference, device, dtype)[1]


def _obstacle(tensors: list[Tensor]) -> str | None:
    """Why no kernel can take these tensors, None if nothing is in the way."""
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a gradient is needed"
    if forward_ad._current_level >= 0:
        return "a derivative in forward mode may be needed"
    if torch.is_autocast_enabled(first.device.type):
        return "autocast chooses the dtype"
    if any(tensor.device != first.device for tensor in tensors):
        return "the tensors are on several devices"
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return "the tensors are of several dtypes"
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, not {dtype_name(tensor.dtype)}"
    if any(tensor.numel() == 0 for tensor in tensors):
        return "a tensor is empty"
    return None


def _check_weights(tensors: list[Tensor], args: tuple) -> None:
    """Raises RuntimeError for numbers beside weights of the meta device, which PyTorch would read from anywhere."""
    tensors = tensors + [arg.values for arg in args if isinstance(arg, Int8)]
    if len({tensor.is_meta for tensor in tensors}) > 1:
        raise RuntimeError("some of the tensors are on the meta device: the weights are not in memory (low_memory?)")


class Operation(Protocol):
    """An operation that may run as a kernel, and its definition in plain PyTorch."""

    reference: Callable[..., Any]

    def __call__(self, *args: Any, **named: Any) -> Any: ...


def _fusible(reference: Callable) -> Operation:
    """The operation that `reference` defines, by its kernel where there is one."""
    name = reference.__name__

    @functools.wraps(reference)
    def run(*args, **named):
        tensors = [arg for arg in (*args, *named.values()) if isinstance(arg, Tensor)]
        device_type = tensors[0].device.type
        there, strict = _choice(name, device_type)
        obstacle = _obstacle(tensors) if there else None
        if there and obstacle is None and (strict or _trusted(name, tensors[0].device, tensors[-1].dtype)):
            result = _kernels[device_type][name](*args, **named)
            if result is not NotImplemented:
                return result
        if strict:
            raise RuntimeError(_refusal(name, tensors[0], there, obstacle))
        _check_weights(tensors, args)                      # a kernel takes none of several devices
        return reference(*args, **named)

    operation: Any = run
    operation.reference = reference
    return operation


def at_once(name: str, x: Tensor, *args: Any) -> Any:
    """The result of a sequence of operations on x as one kernel, NotImplemented where they are to run one by one.

    That is the case for all but a few sequences on the CPU, whose operations each have a kernel there as well, and for
    a compiled model, whose compiler sees the operations. args: as the kernel `name` of `ldm2_kernels` has them.
    """
    if torch.compiler.is_compiling() or not _choice(name, x.device.type)[0]:
        return NotImplemented
    tensors = [x]
    for arg in args:
        if isinstance(arg, (list, tuple)):
            tensors += [part.values if isinstance(part, Int8) else part for part in arg if part is not None]
    floating = [tensor for tensor in tensors if tensor.dtype != torch.int8]
    if any(tensor.device != x.device for tensor in tensors) or _obstacle(floating) is not None:
        return NotImplemented
    return _kernels[x.device.type][name](x, *args)


def release_memory() -> None:
    """The memory that kernels keep for results to come goes back to the system now, not in half a minute."""
    for known in list(_kernels.values()):
        release = known.get("release_memory")
        if release is not None:
            release()


def _refusal(name: str, like: Tensor, there: bool, obstacle: str | None) -> str:
    """One line that says why backend("fused") cannot be kept."""
    device_type = like.device.type
    if not there:
        hint = HINTS.get(device_type)
        return f"no fused {name} on {device_type}" + ("" if hint is None else f": {hint}")
    left = f"it leaves {dtype_name(like.dtype)} {tuple(like.shape)} to plain PyTorch"
    return f"the fused {name} on {device_type} cannot be used: {left if obstacle is None else obstacle}"


@_fusible
def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation of x (B, C, ...) over each of `num_groups` groups of channels, arXiv:1803.08494."""
    return F.group_norm(x, num_groups, weight, bias, eps)


@_fusible
def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None
) -> Tensor:
    """SiLU(group_norm(x + shift)): x (B, C, T, F), shift (B, C) or (1, C), for one value per channel, or None."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps), inplace=True)


@_fusible
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of x (..., D) over its last axis, arXiv:1607.06450."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@_fusible
def add_layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + added, layer_norm(x + added)) for a sum that is needed itself as well. Both (..., D) -> two of (..., D)."""
    x = x + added
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


@_fusible
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: x (..., D_in), weight (D_out, D_in) -> (..., D_out)."""
    return product(x, weight, bias)


@_fusible
def geglu(x: Tensor, gate: Tensor) -> Tensor:
    """x * GELU(gate) with the exact (erf) GELU, arXiv:2002.05202. Both (..., D) -> (..., D)."""
    return x * F.gelu(gate)


@_fusible
def linear_geglu(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """geglu of the two halves of linear(x, weight, bias): x (..., D_in), weight (2 D_out, D_in) -> (..., D_out)."""
    return geglu(*product(x, weight, bias).chunk(2, dim=-1))


@_fusible
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, arXiv:1706.03762 Eq. 1.

    q (B, H, Q, D), k and v (B, H, L, D), bias broadcastable to (B, H, Q, L) in q's dtype -> (B, H, Q, D).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@_fusible
def absorbed_attention(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """Attention to few positions, the projections of queries and outputs within the keys and values.

    x (B, Q, C), keys (B, H, L, C), values (B, C, H, L), bias broadcastable to (B, H, Q, L) or None, offset (C,) of the
    output -> (B, Q, C): the sum over the heads h of softmax(x keys_h^T + bias) values_h^T, plus the offset.
    """
    scores = (x @ keys.flatten(1, 2).mT).unflatten(-1, keys.shape[1:3])      # (B, Q, H, L)
    if bias is not None:
        scores = scores + bias.transpose(1, 2)
    return offset + scores.softmax(-1).flatten(2) @ values.flatten(2).mT


@_fusible
def conv3x3(x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Convolution of x (B, C_in, T, F) with 3x3 kernels, zeros beside the map, plus a residual (B, C_out, T, F)."""
    y = F.conv2d(x, dense(weight, x.dtype), bias, padding=1)
    return y if residual is None else residual + y


@_fusible
def conv1x1(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """A 1x1 convolution: x (B, C_in, T, F), weight (C_out, C_in, 1, 1) -> (B, C_out, T, F)."""
    return F.conv2d(x, dense(weight, x.dtype), bias)


@_fusible
def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbor interpolation of x (B, C, T, F) to `size`."""
    return F.interpolate(x, size=size, mode="nearest")


@_fusible
def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x where x is positive, slope * x elsewhere."""
    return F.leaky_relu(x, slope)


@_fusible
def conv1d(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """Convolution of x (B, C_in, N) with an odd number of taps, zeros beside the sequence -> (B, C_out, N)."""
    return F.conv1d(x, dense(weight, x.dtype), bias, padding=weight.shape[2] // 2)


@_fusible
def conv_transpose1d(x: Tensor, weight: Weight, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Transposed convolution of x (B, C_in, N), weight (C_in, C_out, taps).

    Result: (B, C_out, (N - 1) stride - 2 padding + taps).
    """
    return F.conv_transpose1d(x, dense(weight, x.dtype), bias, stride, padding)


@_fusible
def residual_blocks(x: Tensor, slope: float, dilations: tuple[tuple[int, ...], ...], *parameters: Weight) -> Tensor:
    """Mean of residual blocks of one input x (B, C, N), the multi-receptive field fusion of arXiv:2010.05646.

    A block is pairs of a dilated and a plain convolution of leaky_relu, each pair beside a skip connection. dilations:
    those of each block; parameters: weight and bias of each pair's first and second convolution, block by block.
    """
    total: Tensor | None = None
    given: Iterator[Any] = iter(parameters)
    for block in dilations:
        y = x
        for dilation in block:
            weight = dense(next(given), x.dtype)
            reach = dilation * (weight.shape[2] // 2)
            h = F.conv1d(leaky_relu(y, slope), weight, next(given), padding=reach, dilation=dilation)
            y = y + conv1d.reference(leaky_relu(h, slope), next(given), next(given))
        total = y if total is None else total + y
    return total / len(dilations)
