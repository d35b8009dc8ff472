"""OUT, the folder of a training: its result, and below training/ what is needed to go on.

    OUT/pytorch_lora_weights.safetensors, or a checkpoint in the hub's layout
    OUT/training/job.json      what is trained on what, and how: only the same goes on
    OUT/training/lora.pt       weights, optimiser and step at the last save
    OUT/training/log.jsonl     the loss of each step, and held-out losses
    OUT/training/previews, tensorboard, cache
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm2 import atomic
from ldm2.fields import read_json
from ldm2.training.options import difference

INSIDE = "training"
SAID = "choose another folder, or --overwrite to begin anew"


class Folder:
    """OUT. Raises OSError or ValueError, one line, where no training can go."""

    def __init__(self, out: str | Path):
        self.out = Path(out).expanduser()
        self.inside = self.out / INSIDE
        self._job = self.inside / "job.json"

    def check(self, job: Mapping[str, Any], overwrite: bool) -> None:
        """Raise unless a training can begin here, or this one go on. Nothing is written."""
        if not self.out.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {self.out.absolute().parent} does not exist")
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise NotADirectoryError(f"{self.out} is not a folder")
        if not self._job.is_file():
            if any(self.out.iterdir()):
                raise FileExistsError(f"{self.out} is not empty, and no training made it: choose another folder")
        elif not overwrite:
            self._check_same(job)

    def _check_same(self, job: Mapping[str, Any]) -> None:
        before = read_json(self._job)
        for name in ("model", "data"):
            if name in job and before.get(name) not in (None, job[name]):
                raise ValueError(f"{self.out} holds a training on another {name}, or it has changed since: {SAID}")
        found = difference(before.get("options", {}), job["options"])
        if found is not None:
            raise ValueError(f"{self.out} holds a training with {found}: {SAID}")

    def begin(self, job: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, or take the one of this training; with `overwrite` empty it of an earlier one."""
        if overwrite and self._job.is_file():
            for path in (*self.out.iterdir(), *self.inside.iterdir()):
                if path.name not in (INSIDE, "cache", self._job.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if overwrite or not self._job.is_file():
            self._write(job)

    def settle(self, job: Mapping[str, Any]) -> None:
        """Note what the clips are, now that they are known. Raises ValueError if they were others before."""
        self._check_same(job)
        self._write(job)

    def _write(self, job: Mapping[str, Any]) -> None:
        self.inside.mkdir(parents=True, exist_ok=True)
        with atomic.whole(self._job, overwrite=True) as temporary:
            temporary.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    def check_space(self, needed: int) -> None:
        """Raise OSError if the disk has less room than what a training writes in bytes."""
        free = shutil.disk_usage(self.inside).free
        if free < needed:
            raise OSError(f"{self.out} needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")

    def move_in(self, folder: Path, last: str) -> None:
        """Move what is in a folder of the same disk into OUT; `last`, which says that all is there, at the end."""
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            place = self.out / path.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(path, place)
        folder.rmdir()
