"""The conditions under which the stages compute, whatever the program around them has set for itself."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_DEVICES = ("cpu", "cuda", "mps")                          # that ldm2 computes on
_process = os.getpid()                                     # the one whose threads PyTorch has


def inference(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function without gradients and without autocast. Its tensors are ordinary ones all the same, which a
    training step may keep for its backward pass: alone, in a tuple or a dataclass."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        check_fork()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            result = function(*args, **named)
        with ordinary():
            return _ordinary(result)

    return run


def check_fork() -> None:
    """In a process that was forked, go on in one thread, and say so.

    The threads of OpenMP are not there after a fork, but waited for. Processes that are started by "spawn" have theirs.
    """
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        if torch.get_num_threads() > 1:
            logger.warning("this process was forked and has no threads of OpenMP: it computes in one thread; "
                           "multiprocessing's start method \"spawn\" keeps all")
            torch.set_num_threads(1)


def check_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for float16 on a CPU, which has no instructions for it: 3 s of sound take minutes.

    A model may be loaded there in float16, on its way to a GPU.
    """
    if device.type == "cpu" and dtype == torch.float16:
        raise ValueError("dtype float16 is for GPUs, on a CPU it takes minutes a second of sound: choose float32, or "
                         "bfloat16 for half the memory")


def ordinary() -> ExitStack:
    """`with ordinary():` tensors made inside are ordinary ones without gradients, also under the inference mode of the
    program around."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _ordinary(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple):
        return tuple(map(_ordinary, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _ordinary(getattr(value, field.name)) for field in fields(value)})
    return value
