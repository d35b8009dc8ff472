"""A look through weights for NaN and infinite numbers, when they are needed: it reads them from the disk."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ldm2.runtime.device import dtype_name

_checked: WeakSet[nn.Module] = WeakSet()                   # those without a tensor to look through, until the next load


def leave_unchecked(module: nn.Module, source: str | Path) -> None:
    """Note that a module was filled from `source` and not looked through."""
    global _checked
    module.unchecked, _checked = str(source), WeakSet()  # type: ignore[assignment]


def check_finite(module: nn.Module) -> None:
    """Raise ValueError, naming file and tensor, if weights left unchecked hold NaN or infinite numbers.

    They are read from the disk for it, so this belongs to the door of what needs them next. Later calls cost nothing,
    not even a walk through the module, until something is loaded again.
    """
    checked = _checked                                     # what is loaded meanwhile begins another
    if module in checked:
        return
    for part in module.modules():
        source = vars(part).get("unchecked")
        if source is not None:
            for name, tensor in part.state_dict().items():
                check_tensor(tensor, name, source)
            vars(part).pop("unchecked", None)              # another thread may have come to the same end
    checked.add(module)


def check_tensor(tensor: Tensor, name: str, source: str | Path) -> None:
    # A sum is NaN or infinite where any number is, and takes no memory; it is the exact look that decides.
    if not tensor.is_floating_point() or tensor.is_meta or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    if not torch.isfinite(tensor).all():
        kind = dtype_name(tensor.dtype)
        raise ValueError(f"{source}: {name} holds NaN or infinite numbers in {kind}: the weights are damaged")
