"""What machine and which versions this process has: for reports of measurements, and for whoever looks for a fault."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")


def cpu() -> dict[str, str]:
    """Its name, and which of the vector units that matter it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {"name": platform.processor() or platform.machine(), "units": "not known"}
    name = re.search(r"model name\s*: (.*)", text)
    flags = set((re.search(r"(?:flags|Features)\s*: (.*)", text) or [""] * 2)[1].split())
    units = [unit for unit in VECTOR_UNITS if unit in flags]
    return {"name": name[1] if name else platform.machine(), "units": " ".join(units) or "none of them"}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """The user's cache of ldm2. As its specification asks, an XDG_CACHE_HOME that is empty or relative is ignored."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "ldm2"


def memory(name: str, process: int | str | None = None) -> int:
    """A line of Linux's account in bytes: of the machine, such as MemAvailable, or of a process ("self" is this one),
    such as VmRSS. Raises OSError on other systems."""
    path = Path("/proc/meminfo" if process is None else f"/proc/{process}/status")
    lines = path.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def version(package: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
