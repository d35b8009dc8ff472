"""Tables of any kind, and what a row of them asks for."""

from __future__ import annotations

import json
import re

import pytest

from ldm2.batch.rows import Rules, seed_of
from ldm2.batch.tables import records


def rows(path, **rules):
    rules = Rules({"model": "m"}, words=path.suffix == ".csv", **rules)
    return [rules.row(line, columns) for line, columns in records(path)]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", b'{"prompt": "rain", "steps": 3, "loop": true}\n\n{"prompt": "wind"}\n'),
    ("a.jsonl", b'\xef\xbb\xbf{"prompt": "rain", "steps": 3, "loop": true}\r\n\r\n{"prompt": "wind"}'),
    ("a.csv", b"prompt,steps,loop\nrain,3,true\n,,\nwind,,\n"),
    ("a.csv", b"\xef\xbb\xbfprompt;steps;loop\r\nrain;3;yes\r\n\r\nwind;;\r\n"),
    ("a.csv", b"prompt\tsteps\tloop\nrain\t3\t1\n\nwind\t\t\n"),
    ("a.csv", b"prompt|steps|loop\n\"rain\"|3|on\n\nwind||"),
])
def test_tables_of_all_kinds_hold_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    first, second = rows(tmp_path / name)
    assert (first.line, second.line) == (1 + (name == "a.csv"), 3 + (name == "a.csv"))
    assert {**first.options, "seed": 0} == {"task": "generate", "prompt": "rain", "steps": 3, "loop": True, "seed": 0}
    assert second.options == {"task": "generate", "prompt": "wind", "seed": seed_of(second.id)}


def test_parquet_and_text(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["rain", "wind"], "steps": [3, None], "eta": [float("nan"), None],
                           "times": [None, [[0.5, None]]], "input": [None, __file__], "task": [None, "inpaint"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = rows(tmp_path / "a.parquet")
    assert first.options["steps"] == 3 and "eta" not in first.options
    assert second.options["times"] == [[0.5, None]] and second.input == __file__
    (tmp_path / "a.txt").write_text("rain\n\n{\"wind\"}\n")
    assert [(row.line, row.options["prompt"]) for row in rows(tmp_path / "a.txt")] == [(1, "rain"), (3, '{"wind"}')]
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as Parquet"):
        rows(tmp_path / "b.parquet")


def test_ids_and_seeds_depend_on_the_row_alone(tmp_path):
    lines = [{"prompt": "rain"}, {"prompt": "wind"}, {"prompt": "rain", "seed": 1}, {"prompt": "wind", "id": "w"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])))
    a, b = ({row.id: row.options["seed"] for row in rows(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    assert a == b and len(a) == 4 and len(set(a.values())) == 4 and all(0 <= seed < 2**53 for seed in a.values())
    assert Rules({"model": "another"}).row(1, lines[0]).id not in a


@pytest.mark.parametrize("column, meant", [
    ("step", "steps"), ("Prompt", "prompt"), ("promt", "prompt"), ("num_inference_steps", "steps"), ("sed", "seed"),
    ("guidence_scale", "guidance_scale"), ("neg_prompt", "negative_prompt"),
])
def test_a_column_near_to_an_option_is_refused_unless_it_is_meant(column, meant):
    with pytest.raises(ValueError, match=f"line 3: unknown column '{column}', did you mean {meant}"):
        Rules({}).row(3, {"prompt": "x", column: 1})
    assert Rules({}, allow_extra=True).row(3, {"prompt": "x", column: 1}).extra == {column: 1}


def test_other_columns_are_carried_through():
    row = Rules({}).row(1, {"prompt": "x", "label": "dog", "path": "a.wav"})
    assert row.error is None and row.extra == {"label": "dog", "row_path": "a.wav"}


@pytest.mark.parametrize("columns, words", [
    ({"prompt": ""}, "prompt must not be empty"), ({}, "a prompt is needed"),
    ({"prompt": 3}, "prompt must be a string"),
    ({"prompt": "x" * 10**6}, "prompt may have 10,000 characters, got 1,000,000"),
    ({"prompt": ["a", "b"]}, "prompt must be a string, got list"), ({"prompt": "\ud800"}, "unpaired surrogate"),
    ({"prompt": "x", "seconds": float("nan")}, "seconds must be .* got nan"),
    ({"prompt": "x", "steps": "3"}, "steps must be a positive integer, got '3'"),
    ({"prompt": "x", "steps": {"a": 1}}, "steps"), ({"prompt": "x", "sampler": []}, "unknown sampler"),
    ({"prompt": "x", "seed": -2**80}, "seed must be"), ({"prompt": "x", "seed": [1, 2]}, "seed must be one number"),
    ({"prompt": "x", "seed": True}, "seed must be"), ({"prompt": "x", "eta": 0.5, "sampler": "heun"}, "eta 0.5"),
    ({"prompt": "x", "id": "../x"}, "id must be printable"), ({"prompt": "x", "id": "a/../../x"}, "id must be"),
    ({"prompt": "x", "id": "..\\x"}, "id must be"), ({"prompt": "x", "id": "/etc/x"}, "id must be printable"),
    ({"prompt": "x", "id": "i" * 1000}, "id may have 200 characters, got 1,000"),
    ({"prompt": "x", "id": ""}, "id must"), ({"prompt": "x", "id": "(line 3)"}, r"id must not be '\(line 3\)'"),
    ({"prompt": "x", "id": 1.5}, "id must be text"), ({"prompt": "x", "id": "a\nb"}, "id must be printable"),
    ({"prompt": "x", "task": "dance"}, "unknown task 'dance'"), ({"prompt": "x", "task": 3}, "unknown task 3"),
    ({"prompt": "x", "task": ["generate"]}, "unknown task"), ({"prompt": "x", "task": "reconstruct"}, "reconstruct"),
    ({"prompt": "x", "task": "transfer"}, "transfer needs input"), ({"prompt": "x", "input": "a.wav"}, "no input"),
    ({"prompt": "x", "task": "transfer", "input": "gone.wav"}, "the input 'gone.wav' is missing"),
    ({"prompt": "x", "task": "transfer", "input": "a\0b"}, "needs input"),
    ({"prompt": "x", "task": "transfer", "input": "a" * 5000}, "input"),
    ({"prompt": "x", "strength": 0.5}, "generate has no option 'strength'"),
    ({"prompt": "x", "prompt_at": [[99, "y"]], "seconds": 5}, "prompt_at must lie inside the 5 seconds"),
])
def test_a_bad_row_is_an_error_with_its_line(columns, words):
    row = Rules({}).row(7, columns)
    assert row.error.startswith("line 7: ") and "\n" not in row.error and len(row.error) < 600
    assert re.search(words, row.error), row.error


@pytest.mark.parametrize("name, content, line, words", [
    ("a.jsonl", b'{"prompt": "x"\n{"prompt": "y"}\n', 1, "not JSON"), ("a.jsonl", b"[1]\n", 1, "got list"),
    ("a.jsonl", b'\xff\xfe\n{"prompt": "y"}\n', 1, "not JSON"), ("a.jsonl", b"[" * 100_000 + b"\n", 1, "not JSON"),
    ("a.jsonl", b'{"prompt": "' + b"x" * 5_000_000 + b'"}\n{"prompt": "y"}\n', 1, "more than 4,000,000 bytes"),
    ("a.csv", b"prompt,steps\nrain,3,4\n", 2, "3 cells, the header 2"), ("a.csv", b"prompt,steps\nrain,x\n", 2,
                                                                          "steps must be an integer, got 'x'"),
    ("a.csv", b'prompt,id\n"a bell,1\n', 2, "not CSV (unexpected end of data"),
    ("a.csv", b'prompt,id\n"5 inch,1\nhidden,2\n"a" siren,3\na "low" hum,4\n', 2, "not CSV"),
    ("a.csv", b"prompt,steps\n\xff\xfe,3\n", 2, "unpaired surrogate"), ("a.txt", b"a\n\xff\n", 2, "surrogate"),
])
def test_a_broken_line_costs_no_other(tmp_path, name, content, line, words):
    (tmp_path / name).write_bytes(content)
    found = {row.line: row.error for row in rows(tmp_path / name)}
    assert words in found.pop(line) and all(error is None for error in found.values())


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", b"prompt,prompt\nx,y\n", "each column needs a name"),
    ("a.csv", "prompt,id\nx,1\n".encode("utf-16"), "name of a column contains"),
    ("a.csv", "prompt,caf\xe9\nx,1\n".encode("latin-1"), "name of a column contains an unpaired surrogate at index 3"),
    ("a.jsonl", b'{"prompt": "x", "\\ud800": 1}', "name of a column contains an unpaired surrogate at index 0"),
    ("a.xlsx", b"x", "the input must end in .jsonl"),
])
def test_a_file_that_is_no_table_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        rows(tmp_path / name)


def test_defaults_go_to_rows_that_do_not_give_them(tmp_path):
    source = tmp_path / "in.wav"
    source.write_bytes(b"x")
    rules = Rules({}, {"steps": 9, "seconds": 2.0})
    assert rules.row(1, {"prompt": "x"}).options["steps"] == 9
    assert rules.row(1, {"prompt": "x", "steps": 4}).options["steps"] == 4
    edit = rules.row(1, {"prompt": "x", "task": "transfer", "input": str(source)})
    assert edit.error is None and edit.options["steps"] == 9 and "seconds" not in edit.options
