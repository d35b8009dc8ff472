"""Read the files of torch.save: tensors in plain containers. Nothing in them is run; bytes are mapped and not copied.

PyTorch computes where a tensor lies in a mapped archive and never compares that with the archive's tables. So these are
checked first: every record is stored as it is and lies end to end with its neighbours, and the records have the sizes
that the tensors need.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch

# What torch.load raises on bytes that are no pickle, or a damaged one; UnpicklingError is for what is forbidden in it.
DAMAGED = (
    RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError,
    MemoryError, RecursionError, SyntaxError, struct.error, zipfile.BadZipFile,
)

# What training frameworks leave beside the tensors. None of it is needed, so an Inert stands for it.
HARMLESS = re.compile(
    r"numpy\.(?:_?core\.multiarray\.(?:scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+|bool_?|u?int\d+|float\d+|generic)"
    r"|_codecs\.encode|argparse\.Namespace|pathlib\.(?:_local\.)?\w+|datetime\.\w+|uuid\.UUID|types\.SimpleNamespace"
    r"|collections\.(?:deque|namedtuple)|functools\.partial"
    r"|(?:builtins\.)?(?:int|float|complex|bool|str|bytes|bytearray|list|tuple|dict|set|frozenset|slice|object|range)"
    r"|(?:pytorch_)?lightning(?:_fabric)?\..*|omegaconf\..*|torch\.optim\..*"
)
REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")
LARGEST_TABLE = 2**28                                      # bytes of the pickle in an archive; real ones have one MB
SMALL = 2**20                                              # bytes of a record whose checksum costs nothing
_LOCAL = struct.Struct("<4s2xHHxxxxIIIHH")                 # signature, flags, method, checksum, sizes, two lengths
_lock = threading.Lock()                                   # torch's list of allowed names is one for the process


class Inert:
    """Stands for an object that is not needed: takes anything, does nothing, keeps nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


class Forbidden(ValueError):
    """The pickle asks for what is not in the list of what may be read: `name`, or None where torch does not tell."""

    def __init__(self, name: str | None):
        super().__init__(name)
        self.name = name


def read(path: str | Path) -> object:
    """What a file of torch.save holds, tensors memory-mapped where the format allows.

    Raises Forbidden for what is more than tensors, any of DAMAGED for what is less.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"             # older files are one pickle after another, without tables
        records = check_archive(file) if zipped else None
    sizes: list[int] = []
    content = _load(path, sizes, mapped=zipped)
    if records is not None and (lacking := Counter(size for size in sizes if size) - records):
        raise ValueError(f"its tensors need {max(lacking)} bytes where the archive has no record of that size")
    return content


def _load(path: str | Path, sizes: list[int], mapped: bool) -> object:
    """torch.load, with Inert for names that are harmless; `sizes` takes the bytes of every storage."""
    stand_ins: list[Any] = []                              # (class, the name that it stands for)

    def note(storage: Any, _: str) -> Any:
        sizes.append(storage.nbytes())
        return storage

    while True:
        sizes.clear()
        try:
            if not stand_ins:
                return torch.load(path, map_location=note, weights_only=True, mmap=mapped)
            with _lock, torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location=note, weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            found = REFUSED.search(str(error))
            name = found[1] if found else None
            if name is None or not HARMLESS.fullmatch(name) or name in {known for _, known in stand_ins}:
                raise Forbidden(name) from error
            stand_ins.append((Inert, name))
            if "." not in name:                            # torch leaves the module of these out
                stand_ins.append((Inert, f"builtins.{name}"))


def check_archive(file: BinaryIO) -> Counter[int]:
    """How many records of each size hold tensors. Raises ValueError or BadZipFile where tables and bytes disagree."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        tables = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(tables) != 1:
            raise ValueError(f"the archive has {len(tables)} records data.pkl, expected one")
        if tables[0].file_size > LARGEST_TABLE:
            raise ValueError(f"data.pkl has {tables[0].file_size} bytes, at most {LARGEST_TABLE} make sense")
        end = 0
        for entry, after in zip(entries, [*(entry.header_offset for entry in entries[1:]), archive.start_dir]):
            if entry.header_offset != end:
                raise ValueError(f"record {entry.filename} does not begin where the one before ends")
            _check_record(file, entry, after)
            end = after
        for entry in entries:
            if entry.file_size <= SMALL or entry is tables[0]:
                archive.read(entry)                        # compares the checksum
        order = next((archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")), b"little")
    if order.decode() != sys.byteorder:
        raise ValueError(f"its numbers are in the byte order {order!r}, this machine's is {sys.byteorder}")
    return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)


def _check_record(file: BinaryIO, entry: zipfile.ZipInfo, after: int) -> None:
    """Raise ValueError unless the header before a record says what the archive's table says, and the record ends there.

    after: where the next record begins.
    """
    file.seek(entry.header_offset)
    signature, flags, method, _, stored, size, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    name = file.read(name_length)
    if signature != b"PK\x03\x04" or name != entry.orig_filename.encode() or flags != entry.flag_bits or flags & 1:
        raise ValueError(f"record {entry.filename} has another header than the archive's table")
    if method or entry.compress_type or entry.file_size != entry.compress_size:
        raise ValueError(f"record {entry.filename} is compressed, which torch.save never does: save the tensors again")
    start = entry.header_offset + _LOCAL.size + name_length + extra_length
    rest = after - start - entry.file_size                 # with flag 8 sizes and checksum follow, in 12 to 24 bytes
    if rest not in ((12, 16, 20, 24) if flags & 8 else (0,)):
        raise ValueError(f"record {entry.filename} has {entry.file_size} bytes, its place has {after - start}")
    if not flags & 8 and {stored, size} - {entry.file_size, 2**32 - 1}:
        raise ValueError(f"record {entry.filename} has another size in its header than in the archive's table")
