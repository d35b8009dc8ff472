"""Where the time and the memory of a generation go: stages measured one by one, beside the machine's own limits."""

from __future__ import annotations

import errno
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from ldm2 import ops, samplers
from ldm2.conditioning import Conditioning
from ldm2.guidance import guide
from ldm2.noise import SeededNoise
from ldm2.runtime.graphs import accelerated
from ldm2.runtime.machine import memory
from ldm2.settings import Settings
from ldm2.stages import Stages

COPY_BYTES = 256_000_000
WIDE = 1.15                                                # slowest over median: above it a row is marked


@dataclass(frozen=True)
class Limits:
    """What the machine can do for one dtype: matrix products (FLOP/s) and copies (bytes read and written per second).

    A CPU without instructions for the dtype multiplies in float32: that is then its limit.
    """

    flop_rate: float
    copy_rate: float


@dataclass(frozen=True)
class Work:
    """Something to measure: run() does it once; one generation does it `calls` times. part: whose weights it needs."""

    name: str
    run: Callable[[], object]
    calls: int = 1
    part: nn.Module | None = None


@dataclass(frozen=True)
class Measured:
    """One call of a Work.

    seconds: the median; slowest: the longest. flop: counted on plain PyTorch, a multiply-add as two; operations that
    are no matrix product, convolution or attention count nothing. weights, memory: bytes of its part, and at most in
    addition to what was there before it; None where the system does not tell.
    """

    name: str
    calls: int
    seconds: float
    slowest: float
    flop: int
    weights: int
    memory: int | None

    @property
    def flop_rate(self) -> float:
        """FLOP/s."""
        return self.flop / self.seconds

    @property
    def is_wide(self) -> bool:
        """Whether the repetitions differ so much that the median says little."""
        return self.slowest > WIDE * self.seconds


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch's dispatcher: calls and seconds (its own, without what it calls) per generation."""

    name: str
    calls: int
    seconds: float


# Measuring


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def limits(device: torch.device, dtype: torch.dtype, at_least: float = 0.5) -> Limits:
    """The machine's limits, each the best of repetitions that last `at_least` seconds together."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    kinds = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return Limits(
        flop_rate=max(_product_rate(device, kind, at_least) for kind in kinds),
        copy_rate=2 * COPY_BYTES / _best(lambda: target.copy_(source), device, at_least),
    )


def _product_rate(device: torch.device, dtype: torch.dtype, at_least: float) -> float:
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device, at_least)


def _best(run: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Seconds of the fastest of at least three calls, the first of which warms up."""
    run()
    spent: list[float] = []
    while len(spent) < 2 or sum(spent) < at_least:
        spent.append(seconds_of(run, device))
    return min(spent)


def flop_of(run: Callable[[], object]) -> int:
    """FLOP of one call on the plain path."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with ops.backend("reference"), counter:
        run()
    return counter.get_total_flops()


def _attention_flop(query: torch.Size, key: torch.Size, value: torch.Size, *_, out_shape=None, **__) -> int:
    """Two products of (B, H, Q, D) with (B, H, L, D)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# Attention on a CPU, which torch's counter does not know.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}


def memory_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call takes at most in addition to what there is before it; None where the system does not tell."""
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")      # forget the peak: proc_pid_clear_refs(5)
        before = memory("VmRSS", "self")
    except OSError:
        run()
        return None
    run()
    return max(0, memory("VmHWM", "self") - before)         # memory is given back in between as well


def measure(work: Work, device: torch.device, repeats: int = 3) -> Measured:
    """Run a work at least `repeats` + 3 times: to warm up, to count, to weigh, and to time."""
    work.run()
    flop = flop_of(work.run)
    memory = memory_of(work.run, device)
    seconds = [seconds_of(work.run, device) for _ in range(repeats)]
    return Measured(
        work.name, work.calls, statistics.median(seconds), max(seconds), flop, weight_bytes(work.part), memory
    )


def weight_bytes(part: nn.Module | None) -> int:
    """Memory of the parameters of a module."""
    return 0 if part is None else sum(parameter.nbytes for parameter in part.parameters())


# A generation


def works(pipe: Stages, settings: Settings) -> list[Work]:
    """The stages of a generation after resolved settings, in order; each can be run alone, any number of times."""
    conditioning, unconditional = pipe.conditionings(settings)
    both = Conditioning.join([unconditional, conditioning]) if settings.guided else conditioning
    both = both.to(pipe.device, pipe.dtype)
    timesteps = samplers.timesteps(settings.sampler, pipe.schedule, settings.steps)
    latents = SeededNoise(settings.seeds).draw(*pipe.latent_shape(settings.seconds)).to(pipe.device)

    @torch.inference_mode()
    def prepare() -> tuple:
        return pipe.unet.prepare(both), pipe.unet.embed_time(torch.tensor(timesteps))

    prepared, times = prepare()
    noisy, unet = latents.to(pipe.dtype), accelerated(pipe.unet)

    @torch.inference_mode()
    def step() -> Tensor:
        return unet(noisy, timesteps[0], prepared, time=times[:1])

    prediction = step()

    def guided(x: Tensor, t: float) -> Tensor:
        return guide(prediction, settings.guidance_scale) if settings.guided else prediction.float()

    @torch.inference_mode()
    def walk() -> Tensor:
        return samplers.sample(settings.sampler, guided, latents, pipe.schedule, settings.steps, noise=torch.zeros_like)

    mel = pipe.decode(latents)
    return [
        Work("text", lambda: pipe.conditionings(settings), part=pipe.text),
        Work("keys, values, times", prepare),
        Work("UNet step", step, calls=len(timesteps), part=pipe.unet),
        Work("guidance, sampler", walk),
        Work("VAE", lambda: pipe.decode(latents), part=pipe.vae),
        Work("vocoder", lambda: pipe.vocode(mel), part=pipe.vocoder),
    ]


def operations(works: Iterable[Work], device: torch.device, trace: Path | None = None) -> list[Operation]:
    """The operations of a generation, the most expensive first. trace: file for a Chrome or Perfetto trace of one call
    of each work."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    calls, seconds = Counter[str](), Counter[str]()
    works = list(works)
    with profile(activities=activities) as whole:
        for work in works:
            with record_function(work.name):
                work.run()
                synchronise(device)
    named = {work.name: work for work in works}
    events = [event for event in whole.events() if event.device_type == DeviceType.CPU]      # kernels count for those
    spans = [(event.time_range, named[event.name]) for event in events if event.name in named]
    for event in events:
        work = next((work for span, work in spans if span.start <= event.time_range.start < span.end), None)
        if work is not None and event.name not in named:
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            calls[event.name] += work.calls
            seconds[event.name] += work.calls * own / 1e6
    if trace is not None:
        whole.export_chrome_trace(str(trace))
        _check_trace(trace)
    return [Operation(name, calls[name], spent) for name, spent in seconds.most_common()]


def _check_trace(path: Path) -> None:
    """Raises OSError if a trace is not complete: PyTorch does not say so when a disk is full."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(errno.ENOSPC, "the trace could not be written whole: is the disk full?", str(path))
