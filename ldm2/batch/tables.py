"""Tables of rows in files: JSON lines, CSV, Parquet and plain text, read row by row, whatever stands in them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ldm2.fields import check_file

SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
LONGEST_LINE = 4_000_000                   # bytes; a longer one is refused by itself
SEPARATORS = ",;\t|"

# Number of the line, and its columns by their names; or why it has none.
Record = tuple[int, dict[str, Any] | str]
Wanted = Callable[[int], object]


def records(path: Path, wanted: Wanted = lambda number: True) -> Iterator[Record]:
    """The rows of a file whose numbers are wanted: those of their lines (of Parquet: of the rows), from 1.

    A row that cannot be read comes as the reason. Raises ValueError for an unknown suffix and for what is wrong with
    the file as a whole, OSError where it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"the input must end in {', '.join(SUFFIXES)} (or be - for stdin), got {str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    check_file(path)
    read = {".jsonl": _json_lines, ".txt": _prompts, ".csv": _csv, ".parquet": _parquet}[suffix]
    return read(path, wanted)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines that hold something, without their ends; the reason for one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
        rest = line
        while not whole and rest and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not whole:
            yield number, f"the line has more than {LONGEST_LINE:,} bytes"
        elif line.strip():
            yield number, line.rstrip(b"\r\n")


def _json_lines(path: Path, wanted: Wanted) -> Iterator[Record]:
    """An object a line."""
    with open(path, "rb") as file:
        for number, line in _lines(file):
            if wanted(number):
                yield number, line if isinstance(line, str) else _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    """The object in a line."""
    try:
        columns = json.loads(line.decode())                # no other encoding is guessed at
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON ({error})"
    return columns if isinstance(columns, dict) else f"the line must be a JSON object, got {type(columns).__name__}"


def _prompts(path: Path, wanted: Wanted) -> Iterator[Record]:
    """A prompt a line."""
    with open(path, "rb") as file:
        for number, line in _lines(file):
            if wanted(number):
                yield number, line if isinstance(line, str) else {"prompt": line.decode("utf-8", "surrogateescape")}


def _csv(path: Path, wanted: Wanted) -> Iterator[Record]:
    """A table with a header; its separator is the one that the header holds most of. Empty cells are not given."""
    usual = csv.field_size_limit(LONGEST_LINE)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            separator = max(SEPARATORS, key=header.count)
            file.seek(0)
            table = csv.reader(file, delimiter=separator, strict=True)         # a quote left open hides rows
            names = [name.strip() for name in next(table, [])]
            if "" in names or len(set(names)) < len(names):
                raise ValueError(f"{path}: each column needs a name of its own, got {names}")
            yield from (record for record in _cells(table, names) if wanted(record[0]))
    finally:
        csv.field_size_limit(usual)


def _cells(table: Any, names: list[str]) -> Iterator[Record]:
    """The rows below the header of a CSV file, by the number of their first line."""
    while True:
        number = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"the line is not CSV ({error})"
            continue
        if not any(cells):
            continue
        if len(cells) > len(names):
            yield number, f"the line has {len(cells)} cells, the header {len(names)}"
        else:
            yield number, {name: cell for name, cell in zip(names, cells) if cell != ""}


def _parquet(path: Path, wanted: Wanted) -> Iterator[Record]:
    """A Parquet file; nulls, and NaN, which some programs write in their place, are not given."""
    parquet = pyarrow_parquet()
    from pyarrow import ArrowException

    try:
        batches = parquet.ParquetFile(path).iter_batches(1000)
        for number, columns in enumerate((columns for batch in batches for columns in batch.to_pylist()), 1):
            if wanted(number):
                yield number, {name: value for name, value in columns.items() if value is not None and value == value}
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def pyarrow_parquet() -> Any:
    """pyarrow.parquet. Raises ImportError, one line, where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'ldm2[batch]'") from None
    return pyarrow.parquet
