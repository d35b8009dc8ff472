"""How the documentation is built from the sources: tables of options, and docstrings as lists.

`<!-- options: generate -->` on a page becomes the table of a task's options, read from `ldm2.settings`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parents[1]))
from ldm2.options import default_value, options_of
from ldm2.settings import Output, Settings

MARKER = re.compile(r"<!-- options: (\w+) -->")
TERM = re.compile(r"(?!References?:)([A-Za-z_][\w., ]*): +(\S.*)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return MARKER.sub(lambda marker: table(marker[1]), markdown)


def table(task: str) -> str:
    """The options of a task (or of "save") as Markdown."""
    cls = Output if task == "save" else Settings
    rows = ["| option | default | what it does |", "|---|---|---|"]
    known = sorted(options_of(cls, task).items(), key=lambda item: item[1].group != "prompt")     # these come first
    for name, each in known:
        if name == "task":
            continue
        default = each.default_for(task)
        default = default_value(cls, name) if default is None else default
        text = f"{each.help[0].upper()}{each.help[1:]}".replace("|", "\\|")
        rows.append(f"| `{name}` | {'' if default in (None, ()) else f'`{default}`'} | {text} |")
    return "\n".join(rows)


def listed(text: str) -> str:
    """A docstring as Markdown: lines `name: what it is`, with the lines that continue them, become a list."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        term = TERM.fullmatch(line)
        if term and lines and (in_list or not lines[-1]):
            lines += [""] * (not in_list) + [f"- `{term[1]}`: {term[2]}"]
            in_list = True
        elif in_list and line.startswith("  "):
            lines.append(f"    {line.strip()}")
        else:
            lines += [""] * (in_list and bool(line)) + [line]
            in_list = False
    return "\n".join(line if line.startswith("    ") and not line.strip() else escaped(line) for line in lines)


def escaped(line: str) -> str:
    """Stars outside of code are products, not emphasis."""
    parts = line.split("`")
    return "`".join(part if i % 2 else part.replace("*", "\\*") for i, part in enumerate(parts))


class PlainText(griffe.Extension):
    """The docstrings of ldm2 for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object of the sources."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
