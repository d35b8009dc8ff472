"""Stages of a generation: the time each takes, and parts whose weights are in memory only while they are at work."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ldm2 import ops, weights
from ldm2.runtime import finite, weight_layout
from ldm2.runtime.inference import check_precision, ordinary
from ldm2.runtime.machine import memory

logger = logging.getLogger(__name__)

Load = Callable[[torch.device | str], nn.Module]

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")

STAGES = ("text", "unet", "vae", "vocoder", "ranking")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says so: Python's, or PyTorch's, of which only some have a type of their own."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


class Stage:
    """The time during which a part is at work: `with stage:`. Blocks may be nested; the outermost counts.

    At its end the time and the peak of memory go to the log, as information.
    load: for a part that is in memory during its stage only and on the meta device otherwise. load(device) reads the
    module; it is called with "meta" at once, which checks the files but reads no weights, and with `device` each time a
    stage begins. Calling an unloaded module raises RuntimeError; PyTorch could otherwise read uninitialized memory.
    """

    def __init__(self, name: str, device: torch.device, load: Load | None = None):
        self.name, self.device = name, device
        self.module = None if load is None else load("meta")
        self._load = load
        self._users, self._lock, self._start = 0, threading.Lock(), 0.0
        self._guards: list[RemovableHandle] = []
        self.woken: Callable[[], object] | None = None     # called when the module has been read
        self._sleep()

    def __getstate__(self) -> dict:
        """A copy has a lock of its own."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._start = time.perf_counter()
                self._wake()
            self._users += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._sleep()
                elapsed = time.perf_counter() - self._start
                logger.info("%s: %.2f s, peak memory %s", self.name, elapsed, gigabytes(peak_bytes(self.device)))

    def _wake(self) -> None:
        if self._load is not None:
            with ordinary():
                loaded = self._load(self.device)
                finite.check_finite(loaded)
                _take_over(self.module, loaded)
            if self.woken is not None:
                self.woken()
            weight_layout.arrange(self.module)
            while self._guards:
                self._guards.pop().remove()

    def _sleep(self) -> None:
        if self._load is not None:
            self.module.to("meta")
            give_back()
            self._guards = [part.register_forward_pre_hook(self._refuse) for part in self.module.modules()]

    def _refuse(self, *_) -> None:
        name = self.name
        raise RuntimeError(f"the {name} part has its weights in memory only inside `with pipe.stages[{name!r}]:`")


def in_stage(name: str) -> Callable[[Callable], Callable]:
    """For functions and methods whose first argument is a pipeline: they run in its stage of this name.

    Raises ValueError for float16 on a CPU."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(pipe, *args, **keywords):
            check_precision(pipe.device, pipe.dtype)
            for part in (pipe.text, pipe.unet, pipe.vae, pipe.vocoder):
                finite.check_finite(part)                 # before minutes of work, not after
            with pipe.adapters.hold_in(name), pipe.stages[name]:
                return function(pipe, *args, **keywords)

        return run

    return decorate


def _take_over(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the parameters and buffers of `other`, which has the same structure; ties stay ties."""
    tied: dict[str, Any] = {"remove_duplicate": False}
    for name, value in list(chain(other.named_parameters(**tied), other.named_buffers(**tied))):
        weights.assign(module, name, value)


def give_back() -> None:
    """Hand freed memory back to the system: that which kernels keep for results, and that of blocks smaller than 32 MB,
    which glibc keeps and which are most of a checkpoint."""
    ops.release_memory()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory used so far: on CUDA what torch had allocated there, else what the process held; None on Windows.

    Of the process all pages in memory count, also those of mapped files and of the libraries.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):                                # Linux, where the peak below is at least that of the process
        return memory("VmHWM", "self")                     # which started this one
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def gigabytes(count: int | None) -> str:
    """Bytes for people: "1.23 GB", or "not known"."""
    return "not known" if count is None else f"{count / 1e9:.2f} GB"
