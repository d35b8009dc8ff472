"""Results of a run as a table for people, as JSON, and as a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.timing import Timed, ratio
from ldm2 import __version__, atomic
from ldm2.runtime import machine
from ldm2.runtime.profiling import Limits

PACKAGES = ("diffusers", "transformers", "triton")

Processes = dict[str, float | str]                         # peak memory in bytes, or how one failed


def about(command: str, device: torch.device, settings: dict) -> dict:
    """Machine, versions and command."""
    cpu = machine.cpu()
    return settings | {
        "command": command, "device": str(device),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu["name"],
        "cores": os.cpu_count(), "vector_units": cpu["units"], "threads": torch.get_num_threads(),
        "kernels": _kernels(device), "ldm2": __version__, "python": platform.python_version(),
        "torch": torch.__version__,
    } | {name: machine.version(name) for name in PACKAGES}


def _kernels(device: torch.device) -> str:
    """Which form of ldm2's kernels runs: on a CPU the instruction set that they were compiled for."""
    try:
        from ldm2_kernels import load
    except ModuleNotFoundError:                            # ldm2 runs from a folder without being installed
        return "none"
    if not load(device.type):
        return "none"
    return torch.ops.ldm2_cpu.instruction_sets()[0] if device.type == "cpu" else "Triton"


def rows(timed: Iterable[Timed], limits: Limits) -> list[dict]:
    """Plain values: seconds, how many times faster than the last variant of the row, FLOP/s, bytes."""
    found = []
    for _, group in groupby(timed, key=lambda one: (one.subject, one.name)):
        variants = list(group)
        base = variants[-1]
        for one in variants:
            row = {"subject": one.subject, "name": one.name, "variant": one.variant}
            if one.error is not None:
                found.append(row | {"error": one.error})
                continue
            rate = one.flop / one.median
            found.append(row | {
                "seconds": one.median, "all_seconds": one.seconds, "wide": one.is_wide,
                "speed": ratio(one, base) if one is not base and base.seconds else None,
                "flop_rate": rate or None, "share": rate / limits.flop_rate if rate else None,
                "memory": max(one.memory, default=None),
            })
    return found


def markdown(about: dict, limits: Limits, rows: Sequence[dict], processes: Processes, notes: list[str]) -> str:
    """The tables. processes: peak memory in bytes of processes that load and make one sound."""
    versions = ", ".join(f"{name} {about[name] or 'not installed'}" for name in ("torch", *PACKAGES))
    lines = [
        f"{about['machine']} ({about['cores']} cores, {about['vector_units']}), {about['device']}, "
        f"{about['threads']} threads, {_dtypes(about)}, model {about['size']}, kernels {about['kernels']}", "",
        f"python {about['python']}, {versions}, ldm2 {about['ldm2']}", "",
        f"`{about['command']}`", "",
        f"Limits of the machine in the same run: matrix product {limits.flop_rate / 1e9:.0f} GFLOP/s, copy "
        f"{limits.copy_rate / 1e9:.1f} GB/s. Speed: how many times faster than the row's last variant, median over "
        "pairs of neighbours. Memory: what a run adds at most to what was there.", "",
        "| what | variant | ms | speed | GFLOP/s | of limit | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += map(line, rows)
    if any(row.get("wide") for row in rows):
        lines += ["", "\\* repetitions differ by more than 15 %"]
    if processes:
        lines += ["", "| process that loads the model and makes one sound | peak memory GB |", "|---|---|"]
        lines += [process_line(name, peak) for name, peak in processes.items()]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def line(row: dict) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {row['name']} | {row['variant']} | failed: {row['error']} | | | | |"
    cells = [
        row["name"], row["variant"], f"{1e3 * row['seconds']:.2f}" + ("*" if row["wide"] else ""),
        _cell(row["speed"], ".2f"), _cell(row["flop_rate"], ".0f", 1e-9), _cell(row["share"], ".2f"),
        _cell(row["memory"], ".0f", 1e-6),
    ]
    return f"| {' | '.join(cells)} |"


def process_line(name: str, peak: float | str) -> str:
    """A row of the table of processes; peak: bytes, or how it failed."""
    return f"| {name} | {peak if isinstance(peak, str) else f'{peak / 1e9:.2f}'} |"


def _dtypes(about: dict) -> str:
    """The dtypes of ldm2 and diffusers, once if they are the same."""
    same = about["their_dtype"] == about["dtype"]
    return about["dtype"] if same else f"{about['dtype']} (diffusers: {about['their_dtype']})"


def _cell(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(scale * value, form)


def write(path: Path, text: str) -> Path:
    """A file, complete or not at all; one of an earlier run is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.whole(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def plot(path: Path, rows: Sequence[dict]) -> Path | None:
    """Time against length and against batch, as a PNG; None where neither was measured. Raises ImportError without
    matplotlib."""
    subjects = [name for name in ("length", "batch") if any(row["subject"] == name for row in rows)]
    if not subjects:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(subjects), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["subject"] == subject and "error" not in row:
                x = float(row["name"].split()[0])          # "20 s, ..." or "4 x ..."
                points.setdefault(row["variant"], []).append((x, row["seconds"]))
        for variant, line in points.items():
            ax.plot(*zip(*line), marker="o", label=variant)
        ax.set_xlabel("seconds of sound" if subject == "length" else "sounds at once")
        ax.set_ylabel("time in s")
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.whole(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def to_json(about: dict, limits: Limits, rows: Sequence[dict], processes: Processes, notes: list[str]) -> str:
    """Everything that was measured."""
    content = {"about": about, "limits": vars(limits), "rows": list(rows), "processes": processes, "notes": notes}
    return json.dumps(content, indent=1) + "\n"
