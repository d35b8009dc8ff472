"""The conditions under which the stages compute, whatever the program around them has set for itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda", "mps")                          # that ldm2 computes on


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function without gradients and without autocast. Its tensors are ordinary ones all the same, which a
    training step may keep for its backward pass: alone, in a tuple or a dataclass."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            result = function(*args, **named)
        with ordinary():
            return _ordinary(result)

    return run


def ordinary() -> ExitStack:
    """`with ordinary():` tensors made inside are ordinary ones without gradients, also under the inference mode of the
    program around."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _ordinary(value: R) -> R:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple):
        return tuple(map(_ordinary, value))
    if is_dataclass(value):
        return replace(value, **{field.name: _ordinary(getattr(value, field.name)) for field in fields(value)})
    return value
