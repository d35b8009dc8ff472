"""Output files: they get their names when they are complete, and replace others only where that is asked for."""

from __future__ import annotations

import os
import platform
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm2.options import check_flag

_TAKEN = "{} exists already: choose another name, or ask for it (overwrite=True, --overwrite)"


def check_writable(path: str | Path, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Check that `whole` can write to `path`, before minutes are spent on what to write. Nothing is created.

    inputs: files that must not be overwritten even with `overwrite`, because they are read.
    Raises ValueError for one of `inputs` and for an `overwrite` that is no flag, OSError (which one tells what) for a
    place where no new file can be written.
    """
    path, overwrite = Path(path), check_flag("overwrite", overwrite)         # "no" is true
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {path.parent} is not writable")
    try:
        path.lstat()
    except FileNotFoundError:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    for source in inputs:
        if path.exists() and os.path.exists(source) and path.samefile(source):
            raise ValueError(f"{path} is the input: choose another name for the output")
    if not overwrite:
        raise FileExistsError(_TAKEN.format(path))


@contextmanager
def whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """`with whole(path) as temporary:` gives an empty file in the same folder to write to; it becomes `path` at the end
    of the block, and is gone if the block raises. See `together`."""
    with together([path], overwrite) as [temporary]:
        yield temporary


@contextmanager
def together(paths: Sequence[Path], overwrite: bool = False) -> Iterator[list[Path]]:
    """As `whole`, for several files: all of them get their names at the end, or none does.

    An existing file is never replaced without `overwrite`, even if it appears in the meantime: FileExistsError. Other
    OSErrors about a temporary file come with the name from `paths`, the only one that anybody knows.
    """
    temporaries = {path.with_name(_temporary()): path for path in paths}
    published: list[Path] = []
    for folder in {path.parent for path in paths}:
        _clean(folder)
    try:
        for temporary in temporaries:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield list(temporaries)
        for temporary in temporaries:
            with open(temporary, "r+b") as file:           # on the disk, before the name says that it is complete
                os.fsync(file.fileno())
        for temporary, path in temporaries.items():
            _publish(temporary, path, overwrite)
            published.append(path)
    except BaseException as error:
        if len(published) < len(paths) and not overwrite:
            for path in published:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            unnamed = paths[0] if error.filename is None else None
            if (named := temporaries.get(Path(str(error.filename)), unnamed)) is not None:
                raise OSError(error.errno, error.strerror, str(named)) from error
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _temporary() -> str:
    """A name for a file that is not complete; it says which process writes it, on which machine."""
    return f".ldm2-{machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def machine() -> str:
    """A word for this machine, since folders may be shared by several."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _clean(folder: Path) -> None:
    """Remove what processes of this machine that were killed have left."""
    for path in folder.glob(f".ldm2-{machine()}-*-*.tmp"):
        with suppress(ValueError, OSError):
            if not is_running(int(path.name.split("-")[2])):
                path.unlink()


def is_running(pid: int) -> bool:
    """Whether there is a process of this number; where that cannot be told, there is."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a complete file its name, in one step."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)                                             # unlike a rename, never replaces a file
    except FileExistsError:
        raise FileExistsError(_TAKEN.format(path)) from None
    except OSError:                                                          # no hard links here: claim the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)
