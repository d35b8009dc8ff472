"""The description of the API as a page: made from its OpenAPI document, without scripts, so it reads offline."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
code,pre{font-family:ui-monospace,monospace;font-size:.9em} table{border-collapse:collapse;width:100%}
td{border-top:1px solid #8884;padding:.3rem .6rem .3rem 0;vertical-align:top} summary{cursor:pointer}
h2{margin-top:2.2rem;border-top:1px solid #8886;padding-top:1rem} .muted{opacity:.7}
"""


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    info = document["info"]
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
             f"<title>{_text(info['title'])}</title><style>{_STYLE}</style><h1>{_text(info['title'])} "
             f"{_text(info['version'])}</h1><p>{_text(info['description'])} The document for programs: "
             f"<a href=/openapi.json>openapi.json</a>.</p>"]
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts += _operation(path, method, about)
    parts.append("<h2>Shapes of answers</h2>")
    parts += [f"<details><summary><code>{_text(name)}</code></summary><pre>{_text(json.dumps(schema, indent=2))}</pre>"
              "</details>" for name, schema in document["components"]["schemas"].items()]
    return "".join(parts) + "</html>"


def _operation(path: str, method: str, about: Mapping[str, Any]) -> Iterator[str]:
    """One request: what it does, what it takes, what it answers."""
    yield f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(about.get('description', ''))}</p>"
    rows = [(each["name"], each["schema"], each.get("description", "")) for each in about.get("parameters", ())]
    if rows:
        yield _table(rows)
    for kind, content in about.get("requestBody", {}).get("content", {}).items():
        rows = [(name, schema, schema.get("description", ""))
                for name, schema in content["schema"].get("properties", {}).items()]
        yield f"<details><summary>Body: <code>{_text(kind)}</code></summary>{_table(rows)}</details>"
    answers = ", ".join(f"{status} {answer['description']}" for status, answer in about["responses"].items())
    yield f"<p class=muted>Answers: {_text(answers)}</p>"


def _table(rows: list[tuple[str, Mapping[str, Any], str]]) -> str:
    """Names, types and meanings."""
    lines = (f"<tr><td><code>{_text(name)}</code><td class=muted>{_text(_kind(schema))}<td>{_text(about)}"
             for name, schema, about in rows)
    return f"<table>{''.join(lines)}</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """A type with its limits in a few words."""
    kind = schema.get("type", "")
    words = " or ".join(kind) if isinstance(kind, list) else str(kind)
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is not None or high is not None:
        words += f" {'' if low is None else low}..{'' if high is None else high}"
    return words


def _text(value: str) -> str:
    return html.escape(str(value))
