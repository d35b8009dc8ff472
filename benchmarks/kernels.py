"""Each fused operation beside plain PyTorch, on shapes of a full-size model (10.24 s, both branches of guidance)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.timing import Make, Row, Run
from ldm2 import ops
from ldm2.runtime.graphs import CudaCapture

REPEAT = 20
REPLAYS = 10


def kernels(bench: Bench) -> Iterator[Row]:
    """One row for each operation that has a kernel for this kind of device; for others PyTorch's own is the fused one.
    """
    try:
        from ldm2_kernels import MODULES
        from ldm2_kernels.cases import FULL, cases
    except ModuleNotFoundError:                            # ldm2 runs from a folder without being installed
        return
    there = MODULES.get(bench.device.type, {})
    last = bench.device.type == "cuda" and bench.ours.dtype != torch.float32                 # see runtime.weight_layout
    for name, make in cases(bench.device, bench.ours.dtype, FULL, last).items():
        if there.get(name) is not None:
            arguments = make()
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
