"""Where uploads and results lie while a server runs: a temporary folder that is its own, and gone with it.

A server that was killed leaves its folder; the next one that starts on the machine removes it. That it is still in use
is told by a lock, which the system opens when a process ends in whatever way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ldm2.batch.local import Locked, lock

PREFIX = "ldm2-serve-"
_YOUNG = 60.0                              # seconds in which a folder may be without its lock


class Folder:
    """A new folder below `parent` (default: the system's for temporary files). Raises OSError."""

    def __init__(self, parent: Path | None = None):
        parent = Path(tempfile.gettempdir() if parent is None else parent)
        clean(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = open(self.path / "lock", "wb")        # noqa: SIM115  (as long as the folder lives)
        lock(self._lock.fileno(), self.path)

    def of(self, job: str) -> Path:
        """The folder of a job, made if it is not there."""
        place = self.path / job
        place.mkdir(exist_ok=True)
        return place

    def forget(self, job: str) -> None:
        """Remove what there is of a job."""
        shutil.rmtree(self.path / job, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def clean(parent: Path) -> None:
    """Remove the folders of servers that no longer run, as far as that can be told."""
    if os.name != "posix":
        return
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, Locked):
            about = path.lstat()
            if path.is_symlink() or not path.is_dir() or about.st_uid != os.getuid():
                continue
            if not (path / "lock").exists():
                if time.time() - about.st_mtime > _YOUNG:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            with open(path / "lock", "rb") as held:
                lock(held.fileno(), path)
                shutil.rmtree(path, ignore_errors=True)
