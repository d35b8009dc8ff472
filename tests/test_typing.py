"""What type checkers see of the public names; `typed_use.py` is what mypy itself is run on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ldm2

STUB = Path(ldm2.__file__).with_suffix(".pyi")


def test_type_checkers_see_the_names_that_the_package_has():
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    imported = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported - {None} == set(ldm2.__all__) - {"__version__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ldm2."):
            assert ldm2._HOMES[node.names[0].name] == node.module


@pytest.mark.parametrize("package", ["ldm2", "ldm2_kernels"])
def test_packages_say_that_they_are_typed(package):
    module = __import__(package)
    assert (Path(module.__file__).parent / "py.typed").is_file()
