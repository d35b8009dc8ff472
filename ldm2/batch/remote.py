"""A job's files at an address that fsspec knows, such as s3://bucket/folder: what `ldm2.batch.local` is for a folder.

Object stores put a file in place in one step, so that none is ever there in part. They have no locks and append
nothing: a lock is an object that its owner renews, and lines lie in objects of a thousand.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm2.atomic import is_running, machine
from ldm2.batch.local import IN_USE, OURS, Folder, Locked
from ldm2.fields import one_line

RENEWED = 15.0                             # seconds between two signs of life
DEAD = 90.0                                # seconds without one, after which the owner of a lock has ended
KEPT = 5.0                                 # seconds that lines are kept back at most, while more of them come
LINES = 1000                               # in an object


class Remote:
    """A place in a file system of fsspec."""

    def __init__(self, address: str, files: Any, root: str):
        self._address, self.files, self.root = address, files, root.rstrip("/")

    def __str__(self) -> str:
        return self._address

    def where(self, name: str) -> str:
        """A file as people find it."""
        return f"{self._address}/{name}"

    def make(self) -> None:
        """Object stores have no folders."""

    def names(self) -> list[str]:
        """What lies directly in it, sorted, without locks."""
        try:
            with reached(self._address):
                self.files.invalidate_cache()
                found = [path.rstrip("/").rpartition("/")[2] for path in self.files.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name and not name.startswith(OURS))

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Name, without the folders, and size of each file below `audio`."""
        with reached(self._address):
            found = self.files.find(f"{self.root}/audio", detail=True)
        return ((path.rpartition("/")[2], about["size"]) for path, about in found.items())

    @contextmanager
    def read(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """Copies of files, as paths to read."""
        with tempfile.TemporaryDirectory() as folder:
            copies = [Path(folder) / str(number) for number in range(len(names))]
            for name, copy in zip(names, copies):
                with reached(self.where(name)):
                    self.files.get_file(f"{self.root}/{name}", str(copy))
            yield copies

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write to; what is there at the end of the block is the file, in the place of an older one."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name.rpartition("/")[2]
            yield path
            with reached(self.where(name)):
                self.files.put_file(str(path), f"{self.root}/{name}")

    sound = written

    def lock(self, name: str) -> Lease:
        """Keep others out until it is closed or its owner has ended. Raises Locked."""
        return Lease(self, name)

    def log(self, name: str) -> Parts:
        """The lines of a worker, in objects that no other has."""
        return Parts(self, f"{name}-{secrets.token_hex(8)}")

    def put(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with reached(self.where(name)):
            self.files.pipe_file(f"{self.root}/{name}", content)

    def get(self, name: str) -> bytes | None:
        """What is in a small file; None where there is none."""
        try:
            with reached(self.where(name)):
                self.files.invalidate_cache()
                return self.files.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None


class Parts:
    """Lines in objects that are written anew until they have a thousand lines."""

    def __init__(self, place: Remote, name: str):
        self._place, self._name = place, name
        self._number, self._lines = 0, list[bytes]()
        self._kept, self._since = 0, 0.0

    def add(self, line: bytes) -> None:
        """Append a line. Raises OSError where nothing can be written."""
        if not self._kept:
            self._since = time.monotonic()
        self._lines.append(line)
        self._kept += 1
        if time.monotonic() - self._since >= KEPT or len(self._lines) >= LINES:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are kept back."""
        if self._kept:
            self._place.put(f"{self._name}-{self._number:05}.jsonl", b"".join(self._lines))
            self._kept = 0
        if len(self._lines) >= LINES:
            self._number, self._lines = self._number + 1, []

    def close(self) -> None:
        """Write the rest."""
        self.flush()


class Lease:
    """A lock that lives as long as its owner renews it. Raises Locked while another is alive.

    Of two that come within one second both may get it. Then rows are made twice, and are the same.
    """

    def __init__(self, place: Remote, name: str, *, settle: float = 0.5):
        self._place, self._name = place, name
        self._owner = f"{machine()}-{os.getpid()}-{secrets.token_hex(8)}"
        if self._alive():
            raise Locked(IN_USE.format(place.where(name)))
        self._renew()
        time.sleep(settle)
        if self._held().get("owner") != self._owner:
            raise Locked(IN_USE.format(place.where(name)))
        self._closed = threading.Event()
        threading.Thread(target=self._keep, daemon=True).start()

    def close(self) -> None:
        """Let another have it."""
        self._closed.set()
        if self._held().get("owner") == self._owner:
            with reached(self._place.where(self._name)):
                self._place.files.rm_file(f"{self._place.root}/{self._name}")

    def _held(self) -> dict[str, Any]:
        """Who has it, and since when."""
        try:
            told = json.loads(self._place.get(self._name) or b"{}")
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}

    def _alive(self) -> bool:
        """Whether there is an owner who still works: a process of this machine, or one that was heard of lately."""
        told = self._held()
        at, pid, _ = [*str(told.get("owner")).split("-"), "", ""][:3]
        if at == machine() and pid.isdecimal() and not is_running(int(pid)):
            return False
        renewed = told.get("renewed")
        return isinstance(renewed, (int, float)) and time.time() - renewed < DEAD

    def _renew(self) -> None:
        self._place.put(self._name, json.dumps({"owner": self._owner, "renewed": time.time()}).encode())

    def _keep(self) -> None:
        while not self._closed.wait(RENEWED):
            with suppress(OSError):                        # the next time, perhaps
                self._renew()


@contextmanager
def reached(address: str) -> Iterator[None]:
    """What the libraries of object stores raise becomes an OSError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"{address}: {one_line(error)}") from error


def opened(out: str) -> Folder | Remote:
    """Where files go: a folder, or an address with ://. Raises ValueError for an address that nothing is known of.

    Nothing is read or written there.
    """
    if "://" not in out:
        return Folder(Path(out).expanduser())
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        files, root = fsspec.core.url_to_fs(out)
    except ImportError as error:
        raise ImportError(f"{out} needs a package more: {one_line(error)}") from None
    except Exception as error:
        raise ValueError(f"{out} is no place for files: {one_line(error)}") from error
    return Folder(Path(root)) if isinstance(files, LocalFileSystem) else Remote(out.rstrip("/"), files, root)


def of_one_process(place: Folder | Remote) -> bool:
    """Whether no other process sees what is written there."""
    return isinstance(place, Remote) and "memory" in place.files.protocol
