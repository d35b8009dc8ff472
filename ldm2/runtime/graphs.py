"""The UNet's step, the VAE and the vocoder as CUDA graphs: one launch in place of the hundreds that each is made of,
which a fast GPU runs quicker than they can be issued.

A graph is a recording of launches with all addresses in it. It serves every call of the same shapes once its inputs are
copied to where the recorded call had them. So that a prompt of another length seldom means another graph, the contexts
are padded to multiples of eight tokens; what is added has no weight in any attention.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ldm2 import ops
from ldm2.attention import Attended
from ldm2.runtime.compilation import CompiledUNet, is_compiled, stepper
from ldm2.unet import PreparedConditioning, UNet

BUCKET = 8                                                 # tokens
WARM_UP = 2                                                # calls after which a shape is worth a recording
KEPT = 8                                                   # graphs of one module

Results = tuple[Tensor, ...]
Recorded = TypeVar("Recorded")
Capture = Callable[[Callable[[], Results]], tuple[Callable[[], object], Results]]

_graphs: WeakIdKeyDictionary = WeakIdKeyDictionary()       # first parameter of a module -> its Graphs, gone with it
_lock = threading.Lock()                                   # of the table; each Graphs has its own


def accelerated(unet: UNet) -> UNet | CompiledUNet | GraphedUNet:
    """What takes the calls of a UNet during one run of a sampler: its CUDA graphs, or the UNet (its compiled step).

    The latter where it is not on CUDA or the current stream is not the default one. Calls for which gradients are
    recorded, or under `ops.backend("reference")`, go to the UNet as well.
    """
    device = next(unet.parameters()).device
    return GraphedUNet(stepper(unet), graphs_of(unet, device)) if _records(device) else stepper(unet)


def replayed(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`call`, a method of a module from one tensor to one, which runs as CUDA graphs where `accelerated` would."""
    device = next(module.parameters()).device
    if not _records(device):
        return call
    graphs = graphs_of(module, device)

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or ops.asked() == "reference":
            return call(x)
        with graphs.lock:
            graph = graphs.get((ops.asked(), _kind(x)), lambda: GraphedCall(call, x, graphs.capture))
            if graph is not None:
                return graph(x)
        return call(x)

    return run


def _records(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def graphs_of(module: nn.Module, device: torch.device) -> Graphs:
    """The recorded CUDA graphs of a module; new ones if its weights have moved. A compiled UNet has graphs of its own.
    """
    first, addresses = next(module.parameters()), tuple(parameter.data_ptr() for parameter in module.parameters())
    compiled = isinstance(module, UNet) and is_compiled(module)
    with _lock:
        kinds = _graphs.setdefault(first, {})
        if any(graphs.addresses != addresses for graphs in kinds.values()):
            kinds.clear()
        if compiled not in kinds:
            # A recording is preceded by a call like it. A compiled UNet would be compiled anew there, as the
            # recording's inputs are no inference tensors: so let that be its only one.
            kinds[compiled] = Graphs(CudaCapture(device), addresses, 0 if compiled else WARM_UP)
        return kinds[compiled]


def forget(module: nn.Module) -> None:
    """Let go of a module's graphs, and of their memory; for one whose weights are about to move."""
    with _lock:
        _graphs.pop(next(module.parameters()), None)


class Graphs:
    """The graphs of one module by the shapes of their calls; the one used longest ago makes room for a new one.

    capture:   capture(run) -> (replay, results): run() recorded, and the tensors that replay() fills with its results
    addresses: of the parameters, which the graphs read
    warm_up:   ordinary calls of a shape before it is recorded
    """

    def __init__(self, capture: Capture, addresses: tuple[int, ...] = (), warm_up: int = WARM_UP):
        self.capture, self.addresses, self.warm_up = capture, addresses, warm_up
        self.lock = threading.Lock()
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, Any] = {}

    def get(self, key: tuple, make: Callable[[], Recorded]) -> Recorded | None:
        """The graph for a key; None for its first calls, to be run as they are: they compile and choose kernels."""
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= self.warm_up:
                return None
            if len(self._graphs) == KEPT:
                del self._graphs[next(iter(self._graphs))]
            graph = make()
        self._graphs[key] = graph
        return graph


class Graph:
    """A recorded call on inputs of its own; `changing` change from call to call, `prepared` from run to run."""

    def __init__(
        self, unet: UNet | CompiledUNet, changing: list[Tensor | None], prepared: PreparedConditioning, capture: Capture
    ):
        with torch.inference_mode(False):                  # else they could not be written outside of that mode
            self.changing = [None if tensor is None else torch.empty_like(tensor) for tensor in changing]
            self.prepared = replaced(prepared, torch.empty_like)
        self.owner = weakref.ref(prepared)                 # whose values are in self.prepared
        _copy(tensors(prepared), tensors(self.prepared))
        _copy(changing, self.changing)
        x_t, time, features = self.changing
        self.replay, self.results = capture(lambda: unet.forward_cached(x_t, 0, self.prepared, time, features))

    def __call__(self, changing: list[Tensor | None], prepared: PreparedConditioning) -> Results:
        _copy(changing, self.changing)
        if self.owner() is not prepared:
            _copy(tensors(prepared), tensors(self.prepared))
            self.owner = weakref.ref(prepared)
        self.replay()
        return tuple(result.clone() for result in self.results)              # the next call overwrites them


class GraphedCall:
    """A recorded call from one tensor to one, on an input of its own."""

    def __init__(self, call: Callable[[Tensor], Tensor], x: Tensor, capture: Capture):
        with torch.inference_mode(False):                  # as in Graph
            self.x = torch.empty_like(x)
        self.x.copy_(x)
        self.replay, self.results = capture(lambda: (call(self.x),))

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.replay()
        return self.results[0].clone()                     # the next call overwrites it


class GraphedUNet:
    """Takes the calls of a UNet, which run as graphs. Made for one run of a sampler."""

    def __init__(self, unet: UNet | CompiledUNet, graphs: Graphs):
        self.unet, self.graphs = unet, graphs
        self._lengthened: list[tuple[PreparedConditioning, PreparedConditioning, tuple]] = []

    def __call__(self, x_t: Tensor, t: float, prepared: PreparedConditioning, time: Tensor | None = None) -> Tensor:
        return self.forward_cached(x_t, t, prepared, time)[0]

    def forward_cached(
        self, x_t: Tensor, t: float, prepared: PreparedConditioning, time: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Results:
        """As UNet.forward_cached."""
        if torch.is_grad_enabled() or ops.asked() == "reference":
            return self.unet.forward_cached(x_t, t, prepared, time, features)
        time = self.unet.embed_time(t) if time is None else time
        prepared, shapes = self._bucket(prepared)
        changing = [x_t, time, features]
        key = (ops.asked(), shapes, tuple(None if tensor is None else _kind(tensor) for tensor in changing))
        with self.graphs.lock:
            graph = self.graphs.get(key, lambda: Graph(self.unet, changing, prepared, self.graphs.capture))
            if graph is not None:
                return graph(changing, prepared)
        return self.unet.forward_cached(x_t, t, prepared, time, features)

    def _bucket(self, prepared: PreparedConditioning) -> tuple[PreparedConditioning, tuple]:
        """A padded conditioning, and its shapes; worked out once."""
        for original, long, shapes in self._lengthened:
            if original is prepared:
                return long, shapes
        long = pad_to_bucket(prepared)
        flags = [kv is not None and kv.bias is not None for layers in long.key_values for kv in layers]
        shapes = (tuple(flags), tuple(_kind(tensor) for tensor in tensors(long)))
        self._lengthened.append((prepared, long, shapes))
        return long, shapes


class CudaCapture:
    """Records on one device; all recordings share one pool of memory, as no two of them run at the same time."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)            # one for all: memory of the pool goes from stream to itself

    def __call__(self, run: Callable[[], Results]) -> tuple[Callable[[], object], Results]:
        with torch.cuda.device(self.device):
            beside, current = self.stream, torch.cuda.current_stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):                # libraries set themselves up for a stream at its first call
                run()
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(current),                # a recording that fails leaves its stream as the current one
                torch.cuda.graph(graph, pool=self.pool, stream=beside, capture_error_mode="thread_local"),
            ):
                results = run()
        return graph.replay, results


def pad_to_bucket(prepared: PreparedConditioning) -> PreparedConditioning:
    """A conditioning with contexts padded to multiples of BUCKET tokens; the added ones have a weight of exp(-inf) = 0.
    """
    biases: dict[tuple[int, int], Tensor] = {}             # one for all layers, as before

    def longer(kv: Attended | None) -> Attended | None:
        extra = 0 if kv is None else -kv.keys.shape[2] % BUCKET
        if kv is None or not extra:
            return kv
        length = kv.keys.shape[2]
        bias = kv.keys.new_zeros(prepared.rows, 1, 1, length) if kv.bias is None else kv.bias
        place = (id(kv.bias), length)
        if place not in biases:
            biases[place] = F.pad(bias, (0, extra), value=-torch.inf)
        return kv.lengthened(length + extra, biases[place])

    key_values = tuple(tuple(longer(kv) for kv in layers) for layers in prepared.key_values)
    return replace(prepared, key_values=key_values)


def tensors(prepared: PreparedConditioning) -> Iterator[Tensor]:
    """Each tensor of a conditioning once, in an order that depends on its structure only."""
    seen: set[int] = set()
    key_values = [kv for layers in prepared.key_values for kv in layers if kv is not None]
    every = [tensor for kv in key_values for tensor in (kv.keys, kv.values, kv.bias)]
    for tensor in [*every, prepared.film]:
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def replaced(prepared: PreparedConditioning, change: Callable[[Tensor], Tensor]) -> PreparedConditioning:
    """A conditioning with each tensor changed; those that were one tensor are one again."""
    new = {id(tensor): change(tensor) for tensor in tensors(prepared)}

    def of(kv: Attended | None) -> Attended | None:
        if kv is None:
            return None
        return type(kv)(new[id(kv.keys)], new[id(kv.values)], new.get(id(kv.bias)))

    key_values = tuple(tuple(of(kv) for kv in layers) for layers in prepared.key_values)
    return PreparedConditioning(prepared.rows, key_values, new.get(id(prepared.film)))


def _copy(sources: Iterable[Tensor | None], targets: Iterable[Tensor | None]) -> None:
    for source, target in zip(sources, targets, strict=True):
        if source is not None:
            target.copy_(source)


def _kind(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype
