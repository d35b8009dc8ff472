"""The examples of README.md and docs/: what can run offline is run, the rest is compiled or parsed.

A block below the comment `<!-- not run: ... -->` needs a network or a GPU. Blocks of a page run in order and share
their names. All commands go through the parser, and those with the bundled model are run.
"""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ldm2 import loading
from ldm2.checkpoints import reading
from ldm2.cli import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?P<before>[^\n]*)\n```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
ENDS = ("|", ">", "&&", ";")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether the line above says that it is not run."""

    kind: str
    text: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = FENCE.finditer(text)
    return [Block(each["kind"], each["text"], "<!-- not run:" not in each["before"]) for each in found]


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of each `ldm2 ...` in the blocks of a page that are not Python."""
    found = []
    for block in blocks(page):
        for line in block.text.splitlines() if block.kind in ("", "sh", "console") else ():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;")
            lexer.whitespace_split = True
            parts: list[list[str]] = [[]]
            for word in lexer:
                if word in ENDS:
                    parts.append([])
                else:
                    parts[-1].append(word)
            found += [words[1:] for words in parts if words[:1] == ["ldm2"]]
    return found


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_PYTHON = [page for page in PAGES if any(block.kind == "python" for block in blocks(page))]
WITH_COMMANDS = [page for page in PAGES if commands_of(page)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder but for the sound that the examples edit. Who asks for no number of steps gets few; nor
    does a model with that default outlive the example, as the one that `ldm2.generate` keeps would."""
    defaults = reading._defaults
    monkeypatch.setattr(reading, "_defaults", lambda path: defaults(path) | {"steps": 4})
    monkeypatch.chdir(tmp_path)
    seconds = np.arange(1.5 * 16000) / 16000
    soundfile.write("bell.wav", 0.3 * np.exp(-3 * seconds) * np.sin(2 * np.pi * 440 * seconds), 16000)
    loading._loaded.cache_clear()
    yield tmp_path
    loading._loaded.cache_clear()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids(WITH_PYTHON))
def test_python_of_a_page_runs(page, folder):
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate([block for block in blocks(page) if block.kind == "python"], start=1):
        code = compile(block.text, f"{page.name}, block {number}", "exec")
        if block.runs:
            exec(code, names)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=ids(WITH_COMMANDS))
def test_commands_of_a_page_are_understood(page):
    for words in commands_of(page):
        commands.parser().parse_args(words)


def is_offline(words: list[str]) -> bool:
    """Whether a command needs no network; the doctor, the profiler and the server have tests of their own."""
    return words[0] == "models" or (words[0] not in ("profile", "doctor", "serve") and "tiny" in words)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=ids(WITH_COMMANDS))
def test_commands_with_the_bundled_model_run(page, folder, monkeypatch, capsysbinary):
    for words in filter(is_offline, commands_of(page)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a low bell")))
        assert commands.main(words) == 0, words


def test_blocks_are_found():
    kinds = [block.kind for block in blocks(ROOT / "README.md")]
    assert "python" in kinds and "sh" in kinds
    assert ["models"] in commands_of(ROOT / "README.md")
