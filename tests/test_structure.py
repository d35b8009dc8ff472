"""The plan of the house: who may import whom, read from the sources, `TYPE_CHECKING` included."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ("layers", "attention", "unet", "vae", "vocoder")


def modules(*folders: str) -> dict[str, Path]:
    """Every module of the folders by its dotted name."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imported(path: Path) -> list[str]:
    """What a file imports, anywhere in it, by its dotted name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The known modules that a file imports, anywhere in it."""
    for name in imported(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name:
            yield name


def arrows(*folders: str) -> dict[str, set[str]]:
    """module -> the modules that it imports."""
    known = modules(*folders)
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, each the next and the last the first; none if there is no circle."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name):]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


@pytest.mark.parametrize("folder", ["ldm2", "benchmarks", "tests"])
def test_no_module_imports_itself_through_others(folder):
    assert circle(arrows(folder)) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


@pytest.mark.parametrize("name", MODEL)
def test_the_model_stands_on_operations_and_configuration_alone(name):
    allowed = {f"ldm2.{other}" for other in ("ops", "config", "conditioning", "layers", "attention")}
    assert arrows("ldm2")[f"ldm2.{name}"] <= allowed


def test_samplers_know_neither_guidance_nor_the_model():
    graph = arrows("ldm2")
    for name, used in graph.items():
        if name.startswith("ldm2.samplers"):
            assert not used & {"ldm2.guidance", *(f"ldm2.{part}" for part in MODEL)}, name


def test_the_command_line_is_imported_by_nothing_else():
    for name, used in arrows("ldm2").items():
        if not name.startswith("ldm2.cli") and name != "ldm2.__main__":
            assert not [other for other in used if other.startswith("ldm2.cli")], name


def test_the_description_of_a_request_needs_nothing_heavy():
    graph = arrows("ldm2")
    assert graph["ldm2.settings"] == {"ldm2.option_kinds", "ldm2.options", "ldm2.audio.recorded"}  # to read a file
    assert graph["ldm2.option_kinds"] == {"ldm2.options"} and graph["ldm2.options"] == set()


def test_the_program_imports_neither_its_tests_nor_its_benchmarks():
    for name, used in arrows("ldm2", "tests", "benchmarks").items():
        allowed = {"ldm2": (), "benchmarks": ("benchmarks",), "tests": ("tests", "benchmarks")}[name.split(".")[0]]
        assert all(other.split(".")[0] in ("ldm2", *allowed) for other in used), name


def test_the_floor_is_not_crowded():
    assert len(list((ROOT / "ldm2").glob("*.py"))) <= 30


@pytest.mark.parametrize("folder", ["ldm2", "kernels", "benchmarks"])
def test_no_file_is_longer_than_can_be_kept_in_mind(folder):
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count > 400] == []
