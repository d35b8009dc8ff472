"""Each fused operation beside plain PyTorch, on shapes of a full-size model (10.24 s, both branches of guidance)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.timing import Make, Row, Run
from ldm2 import ops
from ldm2.runtime.graphs import CudaCapture

if TYPE_CHECKING:
    from benchmarks.rows import Bench

GROUPS = 32
EPS = 1e-5
REPEAT = 20
REPLAYS = 10


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, tuple]:
    """Name of an operation -> arguments, which lie in memory as those of the models."""
    last = device.type == "cuda" and dtype != torch.float32                  # see ldm2.runtime.weight_layout

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def image(*shape: int) -> Tensor:
        return new(*shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def norm(channels: int) -> tuple[Tensor, Tensor]:
        return new(channels), new(channels)

    tokens, wave = (2, 1024, 256), (1, 128, 12800)
    block = [new(*shape) for _ in range(3) for shape in ((128, 128, 7), (128,)) * 2]
    return {
        "group_norm_silu": (image(2, 256, 128, 8), GROUPS, *norm(256), EPS, new(2, 256)),
        "group_norm": (image(2, 256, 128, 8), GROUPS, *norm(256), EPS),
        "layer_norm": (new(*tokens), *norm(256), EPS),
        "add_layer_norm": (new(*tokens), new(*tokens), *norm(256), EPS),
        "linear": (new(*tokens), new(256, 256), new(256)),
        "linear_geglu": (new(*tokens), new(2048, 256), new(2048)),
        "geglu": (new(2, 1024, 1024), new(2, 1024, 1024)),
        "attention": tuple(new(2, 8, 1024, 32) for _ in range(3)),
        "conv3x3": (image(2, 256, 128, 8), image(256, 256, 3, 3), new(256), image(2, 256, 128, 8)),
        "conv1x1": (image(2, 384, 128, 8), image(256, 384, 1, 1), new(256)),
        "leaky_relu": (new(*wave), 0.1),
        "add_leaky_relu": (new(*wave), new(*wave), 0.1),
        "add_up": (new(*wave), new(*wave), new(*wave), 3),
        "conv1d": (new(1, 64, 1024), new(1024, 64, 7), new(1024)),
        "conv_transpose1d": (new(1, 256, 5120), new(256, 128, 16), new(128), 4, 6),
        "residual_blocks": (new(*wave), 0.1, ((1, 3, 5),), *block),
        "guide": (image(2, 8, 256, 16), 3.5),
        "axpby": (0.5, new(1, 8, 256, 16).float(), 0.5, image(2, 8, 256, 16), 3.5),
    }


def kernels(bench: Bench) -> Iterator[Row]:
    """One row for each operation that has a kernel for this kind of device; for others PyTorch's own is the fused one.
    """
    try:
        from ldm2_kernels import MODULES
    except ModuleNotFoundError:                            # ldm2 runs from a folder without being installed
        return
    there = MODULES.get(bench.device.type, {})
    for name, arguments in cases(bench.device, bench.ours.dtype).items():
        if there.get(name) is not None:
            first = next(argument for argument in arguments if isinstance(argument, Tensor))
            shape = " x ".join(map(str, first.shape))
            calls = REPLAYS if bench.device.type == "cuda" else 1
            variants = _variants(name, arguments, bench.device)
            yield Row("kernels", f"{REPEAT} {name}, {shape}", variants, calls=calls)


def _variants(name: str, arguments: tuple, device: torch.device) -> dict[str, Make]:
    repeated = functools.partial(_repeated, name, arguments, device)
    return {"fused": functools.partial(repeated, "fused"), "plain PyTorch": functools.partial(repeated, "reference")}


def _repeated(name: str, arguments: tuple, device: torch.device, backend: str) -> Run:
    """The operation REPEAT times, as once is too short for a clock; on CUDA as a graph, as a GPU is done with it before
    Python has dispatched the next one."""

    @torch.no_grad()
    def run() -> None:
        with ops.backend(backend):
            for _ in range(REPEAT):
                getattr(ops, name)(*arguments)

    return CudaCapture(device)(run)[0] if device.type == "cuda" else run
