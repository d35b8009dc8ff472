"""The suite itself."""

import ast
from pathlib import Path

HERE = Path(__file__).parent


def test_no_test_module_imports_another():
    """What several need stands in helpers.py, or in a module of its own beside them."""
    wrong = []
    for path in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names] + ["." * node.level]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            wrong += [f"{path.relative_to(HERE)}: {name}" for name in names
                      if name.startswith(("tests.", ".")) and any(part.startswith("test_") for part in name.split("."))]
    assert not wrong
