"""Whether a kernel computes on this machine what its operation means.

The rule: its error against float64 is at most twice that of plain PyTorch in the same dtype, plus FLOOR of the result;
errors and results as their root mean squares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm2_kernels.cases import SMALL, TALL, cases

FLOOR = 3e-6
_TALL_TOO = ("group_norm", "group_norm_silu")              # have another form for what one program does not hold


def excess(results: object, plain: object, exact: object) -> float:
    """The largest error among the results (one tensor or several) as a share of what the rule allows: good up to 1.

    Raises ValueError for another shape or dtype than plain PyTorch's.
    """
    shares = []
    for got, other, right in zip(_several(results), _several(plain), _several(exact), strict=True):
        if (got.shape, got.dtype) != (other.shape, other.dtype):
            raise ValueError(f"{got.dtype} {tuple(got.shape)} instead of {other.dtype} {tuple(other.shape)}")
        right = right.double()
        allowed = 2 * _rms(other.double() - right) + FLOOR * _rms(right)
        shares.append(_rms(got.double() - right) / allowed)
    return float("nan") if any(share != share for share in shares) else max(shares)


def measure(kernel: Callable, reference: Callable, arguments: tuple) -> float | None:
    """`excess` of a kernel on these arguments; None if it leaves them to plain PyTorch. What it raises is passed on."""
    results = kernel(*arguments)
    if results is NotImplemented:
        return None
    doubled = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    return excess(results, reference(*arguments), reference(*doubled))


@torch.no_grad()
def verdict(
    name: str, kernel: Callable, reference: Callable, device: torch.device, dtype: torch.dtype,
    held: Callable[[Tensor], object] | None = None,
) -> tuple[float | None, str | None]:
    """`worst`, and what is wrong with the kernel of an operation for small inputs in one line, None if nothing is.

    held: makes of the weight of a linear layer what the layer has in its place, such as `ldm2.ops.W8A8`.
    Draws no random numbers but its own. An error of any kind is a fault: compilers and drivers have many.
    """
    try:
        share = worst(name, kernel, reference, device, dtype, held)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return None, f"{type(error).__name__}: {first_line[:200]}"
    if share is not None and not share <= 1:
        return None, f"its error is {share:.3g} times what the rule allows"
    return share, None


def worst(
    name: str, kernel: Callable, reference: Callable, device: torch.device, dtype: torch.dtype,
    held: Callable[[Tensor], object] | None = None,
) -> float | None:
    """The largest `excess` over the small cases of an operation; None if the kernel leaves all to plain PyTorch.

    held: as of `verdict`.
    """
    last = device.type == "cuda" and dtype != torch.float32                  # as the models lay out their maps there
    sizes = (SMALL, TALL) if name in _TALL_TOO else (SMALL,)
    arguments = [cases(device, dtype, size, last)[name]() for size in sizes]
    if held is not None:
        arguments = [(x, held(weight), *rest) for x, weight, *rest in arguments]
    found = [measure(kernel, reference, each) for each in arguments]
    found = [share for share in found if share is not None]
    return max(found, key=lambda share: float("inf") if share != share else share) if found else None


def _several(results: object) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
