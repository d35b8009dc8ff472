"""What `ldm2 doctor` finds out: versions, machine, kernels and whether they compute what they should, speed, cache."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm2 import __version__, ops
from ldm2.checkpoints import known
from ldm2.checkpoints.hub import is_cached
from ldm2.checkpoints.int8 import quantize
from ldm2.fields import flat
from ldm2.runtime import machine, profiling
from ldm2.runtime.device import W8A8, dtype_name, multiplies_bfloat16

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "soundfile", "soxr", "tqdm",
            "triton", "diffusers", "phonemizer", "matplotlib", "scipy")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
# Weights of bytes, by the dtype that is asked for, which linear layers on the CPU multiply with float32.
BYTES = {"int8": ops.Int8, W8A8: ops.W8A8}
VARIABLES = ("LDM2_KERNELS", "LDM2_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
             "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")
ASKED = "cvssp/audioldm2"                                  # what the hub is asked for, to see whether it answers
PATIENCE = 5.0                                             # seconds for its answer

Rows = list[dict[str, Any]]


def examine() -> dict[str, Any]:
    """Everything, as plain values. Takes 10 to 20 seconds."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return {
        "versions": versions(), "machine": about(), "gpu": gpus(), "environment": environment(),
        "kernels": [row for device in devices for row in kernels(device)],
        "speed": [row for device in devices for row in speed(device)],
        "hub": hub(), "disk": disk(),
    }


def versions() -> dict[str, str | None]:
    """Versions of ldm2, Python and packages; None for what is not installed."""
    packages = {name: machine.version(name) for name in PACKAGES}
    return {"ldm2": __version__, "python": platform.python_version(), "system": platform.platform()} | packages


def about() -> dict[str, object]:
    """Processor, cores, memory in bytes (None where the system does not tell), and what PyTorch makes of them."""
    cpu = machine.cpu()
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES") if name in _names()}
    memory = [pages[name] * os.sysconf("SC_PAGE_SIZE") if name in pages else None
              for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")]
    return {"cpu": cpu["name"], "vector_units": cpu["units"], "cores": machine.cores(),
            "threads": torch.get_num_threads(), "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "memory": memory[0], "memory_free": memory[1]}


def _names() -> dict[str, int]:
    return getattr(os, "sysconf_names", {})


def gpus() -> Rows:
    """CUDA devices; an Apple GPU by its name alone."""
    found: Rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory": total,
                      "memory_free": free, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()})
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps)"})
    return found


def environment() -> dict[str, str]:
    """The variables that change what ldm2 does, where they are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def kernels(device: torch.device) -> Rows:
    """Each operation: which kernel runs for it on this device, or why none does, and how exact it is.

    "shares" is, by dtype, the kernel's error as a share of what the rule of ldm2_kernels.check allows (good up to 1),
    None where it leaves the dtype to PyTorch; "faults" what is wrong, by dtype, where anything is.
    """
    loaded, why = _loaded(device.type)
    rows: Rows = []
    for name, reason in _operations(device.type).items():
        row: dict[str, Any] = {"device": device.type, "operation": name, "kernel": None, "why": reason or why,
                               "shares": {}, "faults": {}}
        kernel = loaded.get(name)
        if kernel is not None:
            row |= {"kernel": f"{kernel.__module__}.{name}", "why": None}
            for dtype in _dtypes(name, device.type):
                share, fault = _verdict(name, kernel, device, dtype)
                row["shares"][dtype] = share
                if fault is not None:
                    row["faults"][dtype] = fault
        rows.append(row)
    return rows


def _operations(device_type: str) -> dict[str, str | None]:
    """Operations -> why PyTorch's own is as good, None for those with a kernel."""
    if ops.ldm2_kernels is None:
        return {"all": None}
    reasons = ops.ldm2_kernels.REASONS[device_type]
    return {name: reasons.get(name) for name in ops.ldm2_kernels.MODULES[device_type]}


def _loaded(device_type: str) -> tuple[dict[str, Callable | None], str | None]:
    """The kernels for a type of device, and why there are none."""
    if ops.ldm2_kernels is None:
        return {}, "the package ldm2_kernels is not installed"
    try:
        found = ops.ldm2_kernels.load(device_type)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return {}, f"they cannot be loaded: {flat(error, 200)}"
    return found, None if found else ops.HINTS[device_type]


def _dtypes(name: str, device_type: str) -> list[str]:
    """Those in which an operation is tried."""
    bytes_too = device_type == "cpu" and name in ("linear", "linear_geglu")
    return [*map(dtype_name, DTYPES[device_type]), *(BYTES if bytes_too else ())]


def _verdict(name: str, kernel: Callable, device: torch.device, dtype: str) -> tuple[float | None, str | None]:
    from ldm2_kernels.check import verdict

    held = None if dtype not in BYTES else lambda weight: BYTES[dtype](*quantize("weight", weight))
    computed = torch.float32 if held else getattr(torch, dtype)
    with ops.backend("reference"):
        return verdict(name, kernel, getattr(ops, name).reference, device, computed, held)


def speed(device: torch.device) -> Rows:
    """Matrix products (FLOP/s) and copies (bytes/s), measured now, in the dtypes that make sense on this device."""
    if device.type == "cuda":
        dtypes = [torch.float32, torch.float16]
    else:
        dtypes = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16(device) else [])]
    rows = []
    for dtype in dtypes:
        limits = profiling.limits(device, dtype, at_least=0.3)
        rows.append({"device": device.type, "dtype": dtype_name(dtype), "flop_rate": limits.flop_rate,
                     "copy_rate": limits.copy_rate})
    return rows


def hub() -> dict[str, object]:
    """Where the cache is, which known checkpoints are in it, and whether the hub answers."""
    from huggingface_hub import constants

    names = [model.name for model in known.MODELS if model.repo is not None and is_cached(model)]
    return {"cache": constants.HF_HUB_CACHE, "endpoint": constants.ENDPOINT, "checkpoints": names,
            "state": _answer()}


def _answer() -> str:
    """What comes of one small question to the hub."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(ASKED, timeout=PATIENCE)
    except errors.HfHubHTTPError as error:
        return f"answers, and refuses {ASKED} (HTTP {error.response.status_code})"
    except (OSError, errors.HTTPError) as error:
        return f"does not answer ({type(error).__name__}: {flat(error, 200)})"
    return "answers"


def disk() -> Rows:
    """Free bytes where ldm2 writes: the cache, the current folder, the temporary folder."""
    from huggingface_hub import constants

    places = {"cache": Path(constants.HF_HUB_CACHE), "current folder": Path.cwd(),
              "temporary": Path(tempfile.gettempdir())}
    rows = []
    for name, path in places.items():
        there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        rows.append({"place": name, "path": str(path), "free": shutil.disk_usage(there).free})
    return rows


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong in the findings of `examine`, one line each."""
    return [f"the fused {row['operation']} on {row['device']} in {dtype}: {fault}"
            for row in found["kernels"] for dtype, fault in row["faults"].items()]
