"""Tables by their columns, as engines hand them to a worker: to rows, and records back to such tables.

A table is a mapping of names to sequences (lists, numpy arrays), or an Arrow table, whose types survive.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm2.batch.rows import MANIFEST, Row, Rules, nameless
from ldm2.fields import one_line

if TYPE_CHECKING:
    import pyarrow

READY = "ldm2_row"                         # the column of rows that are read already, each as JSON
# Arrow's types of what a record says, so that blocks without a success have those of others.
TYPES = {"seed": "uint64", "seconds": "float64", "sample_rate": "int64", "score": "float64", "ms": "float64",
         "bytes": "int64", "line": "int64"}

Columns = Mapping[str, Sequence[Any]]


def ready(rows: Iterable[Row]) -> list[str]:
    """Rows as JSON, for the column READY."""
    return [json.dumps(dataclasses.asdict(row)) for row in rows]


def rows_in(columns: Columns | pyarrow.Table, rules: Rules) -> list[Row]:
    """The rows of a table. What is wrong with one, its columns included, becomes its error."""
    given = columns if isinstance(columns, Mapping) else columns.to_pydict()
    if READY in given:
        return [Row(**json.loads(text)) for text in given[READY]]
    return [_row(number, _given(dict(zip(given, values))), rules)
            for number, values in enumerate(zip(*given.values()), 1)]


def _row(number: int, values: dict[str, Any], rules: Rules) -> Row:
    """A row of a table."""
    try:
        return rules.row(number, values)
    except ValueError as error:                            # a column's name: whoever has the table is elsewhere
        return Row(number, nameless(number), error=one_line(error))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a row has, numpy's numbers as Python's."""
    plain = {name: value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
             for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None and value == value}


def records_in(records: Sequence[Mapping[str, Any]], columns: Columns | pyarrow.Table, rules: Rules) -> Any:
    """A table of records, of the kind of the table that they were made of, with what that has beside options."""
    if isinstance(columns, Mapping):
        every = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in every}
    import pyarrow

    table = {name: pyarrow.array([record[name] for record in records], TYPES.get(name, "string")) for name in MANIFEST}
    for name in columns.column_names:
        carried = rules.carried(name)
        if carried is not None and name != READY:
            table.setdefault(carried, columns[name])
    return pyarrow.table(table)
