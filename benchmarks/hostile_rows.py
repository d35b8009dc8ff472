"""Rows that a job must survive: each is nonsense of another kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

X = {"prompt": "x", "steps": 1, "seconds": 0.4}
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": ""}, {}, {"prompt": None}, {"prompt": 3}, {"prompt": "x" * 1_000_000}, {"prompt": "\ud800"},
    X | {"seconds": float("nan")}, X | {"seconds": -1}, X | {"seconds": 1e300}, X | {"seconds": "ten"},
    X | {"steps": 0}, X | {"steps": 2.5}, X | {"steps": [1]}, X | {"seed": "x"}, X | {"seed": 2**70},
    X | {"sampler": "magic"}, X | {"eta": 0.5, "sampler": "heun"}, X | {"prompt_at": [[9, "y"]]},
    X | {"id": "../../etc/passwd"}, X | {"id": "/tmp/x"}, X | {"id": "i" * 1000}, X | {"id": ""}, X | {"id": {"a": 1}},
    X | {"id": "g0", "steps": 2}, X | {"task": "dance"},
    {"prompt": "x", "task": "transfer", "input": "gone.wav"}, {"prompt": "x", "task": "transfer", "input": "/dev/zero"},
)
LINES = (b'{"prompt": "x", "steps": 1', b'["prompt"]', b"\xff\xfe\x00{", b"[" * 100_000)


def write(path: Path, good: int) -> tuple[int, set[int]]:
    """Write a table with good rows (ids g0, g1, ...) and all hostile ones -> number of good ones, lines of the bad."""
    lines = [json.dumps(X | {"id": f"g{row}"}).encode() for row in range(good)]
    lines += [*(json.dumps(row).encode() for row in ROWS), *LINES]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return good, set(range(good + 1, len(lines) + 1))


def faults(place: Path, good: int, bad: set[int], code: int, told: str) -> Iterator[str]:
    """What is not as it must be of a job over `place`/rows.jsonl into `place`/out."""
    if code != 1 or "Traceback" in told or f"{good} done now, {len(bad)} failed" not in told:
        yield f"exit code {code}: {told[-500:]}"
    records = [json.loads(line) for line in (place / "out/manifest.jsonl").read_text().splitlines()]
    failed = {record["line"]: record["error"] for record in records if record["status"] == "error"}
    if failed.keys() != bad:
        yield f"the lines {sorted(failed.keys() ^ bad)} are not told as they are"
    for line, error in failed.items():
        if not error.startswith(f"line {line}: ") or "\n" in error:
            yield f"line {line} has the error {error!r}"
    if len({record["id"] for record in records}) < len(records):
        yield "an id stands twice in the manifest"
    if sorted(path.name for path in place.iterdir()) != ["out", "rows.jsonl"]:
        yield f"something lies outside: {sorted(place.iterdir())}"
    if len([path for path in (place / "out/audio").rglob("*") if path.is_file()]) != good:
        yield "there are other sounds than those of the good rows"
