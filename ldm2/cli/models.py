"""The command `ldm2 models`: the known checkpoints."""

from __future__ import annotations

from pathlib import Path

from ldm2.checkpoints.known import MODELS


def table(cache_dir: str | Path | None = None) -> str:
    """The known checkpoints as text, one a line: what `ldm2 models` prints."""
    from ldm2.checkpoints import hub

    rows = [("name", "task", "rate", "parameters", "download", "here", "licence", "from", "same weights as")]
    for model in MODELS:
        rows.append((
            model.name, model.task, f"{model.sample_rate // 1000} kHz", _count(model.parameters),
            "-" if model.layout == "bundled" else _bytes(model.download),
            "yes" if hub.is_cached(model, cache_dir) else "no",
            model.license, model.repo or "this package", model.same_as or "",
        ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e6:.0f} M"


def _bytes(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e9:.1f} GB"
