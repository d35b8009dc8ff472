"""A job's files in a folder of this machine, or one that it shares with others.

Files have their names when they are complete. What holds a job's files (`Folder` here, `Remote` for object stores) has
the same methods; files are named by their place below it, with slashes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ldm2.atomic import whole

try:
    import fcntl
except ImportError:                        # not on Windows
    fcntl = None

OURS = (".lock-", ".ldm2-")                # how the names of locks and of temporary files begin
IN_USE = "{} is in use: another ldm2 batch works on this folder and shard"


class Locked(ValueError):
    """Another process holds it."""


class Folder:
    """A folder."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def where(self, name: str) -> str:
        """A file as people find it."""
        return str(self.path / name)

    def make(self) -> None:
        """Make the folder if it is not there."""
        self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """What lies directly in it, sorted, without locks and temporary files."""
        found = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(name for name in found if not name.startswith(OURS))

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name, without the folders, and size of each file in the folders of `audio`."""
        audio = self.path / "audio"
        for drawer in os.scandir(audio) if audio.is_dir() else ():
            if drawer.is_dir():
                yield from ((entry.name, entry.stat().st_size) for entry in os.scandir(drawer))

    @contextmanager
    def read(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """Files, as paths to read."""
        yield [self.path / name for name in names]

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write to; what is there at the end of the block is the file, in the place of an older one."""
        with whole(self.path / name, overwrite=True) as temporary:
            yield temporary

    @contextmanager
    def sound(self, name: str) -> Iterator[Path]:
        """As `written`, for who writes none but complete files."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    def lock(self, name: str) -> Lock:
        """Keep others out until it is closed or its owner ends. Raises Locked."""
        return Lock(self.path / name)

    def log(self, name: str) -> Log:
        """The lines of a worker, which no other has. Raises Locked."""
        return Log(self.path / f"{name}.jsonl")


class Lock:
    """A file that is locked until it is closed or its process ends; patience: see `lock`. Raises Locked."""

    def __init__(self, path: Path, patience: float = 0.0):
        self.file = open(path, "a+b", buffering=0)         # noqa: SIM115  (as long as the object lives)
        try:
            lock(self.file.fileno(), path, patience)
        except Locked:
            self.file.close()
            raise

    def close(self) -> None:
        """Unlock it."""
        self.file.close()


def lock(descriptor: int, path: Path, patience: float = 0.0) -> None:
    """Lock an open file until it is closed or its process ends.

    Raises Locked if another process still has it after `patience` seconds.
    """
    until = time.monotonic() + patience
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= until:
                raise Locked(IN_USE.format(path)) from None
            time.sleep(0.1)


class Log(Lock):
    """Lines in a file. What a killed process left without its end is cut off."""

    def __init__(self, path: Path):
        super().__init__(path, patience=10.0)
        size = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        rest = len(self.file.readall().rpartition(b"\n")[2])
        if rest:
            self.file.truncate(size - rest)

    def add(self, line: bytes) -> None:
        """Append a line, in one piece. Raises OSError where the disk is full; nothing of the line is left then."""
        end = self.file.seek(0, os.SEEK_END)
        if self.file.write(line) < len(line):
            self.file.truncate(end)
            raise OSError(f"{self.file.name} could not be written: is the disk full?")

    def flush(self) -> None:
        """Nothing is kept back."""
