"""What is named as a file is there, and is a file: a pipe or a device in its place would be read for ever."""

import os
import re

import pytest

from ldm2 import fields
from ldm2.batch import tables
from ldm2.batch.rows import Rules
from ldm2.checkpoints.convert import convert
from ldm2.checkpoints.hub_folder import weight_files
from ldm2.metrics.evaluation import sound_files
from ldm2.training import data
from ldm2.weights import read_tensors


def _row_of_a_table(path):
    table = path.with_name("table.jsonl")
    table.write_text(f'{{"file_name": "{path.name}", "text": "rain"}}\n')
    data.read(table)


def _row_of_a_batch(path):
    error = Rules({}).row(1, {"prompt": "rain", "task": "transfer", "input": str(path)}).error
    raise ValueError(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
@pytest.mark.parametrize("name, read", [
    ("pipe", data.read), ("pipe", _row_of_a_table), ("pipe", _row_of_a_batch), ("pipe", sound_files),
    ("pipe", fields.check_file), ("pipe", fields.read_json), ("pipe", weight_files), ("pipe", fields.check_folder),
    ("pipe", lambda path: convert(path, path.with_name("out"))), ("pipe.safetensors", read_tensors),
    ("pipe.pth", read_tensors), *((f"pipe{suffix}", tables.records) for suffix in tables.SUFFIXES),
    ("pipe.jsonl", data.read),
])
def test_a_pipe_is_there_but_neither_file_nor_folder(tmp_path, name, read):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}'? is not a (file|folder)") as refusal:
        read(tmp_path / name)
    assert "missing" not in str(refusal.value) and "exist" not in str(refusal.value)


@pytest.mark.parametrize("check", [fields.check_file, fields.check_folder])
def test_what_is_not_there_is_missing(tmp_path, check):
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'gone'))} is missing$"):
        check(tmp_path / "gone")


@pytest.mark.parametrize("text, most, line", [
    ("a\n b\t c", 9, "a b c"), ("abcdef", 6, "abcdef"), ("abcdefg", 6, "abcdef ..."), ("", 6, ""),
])
def test_a_text_in_one_line(text, most, line):
    assert fields.flat(text, most) == line
