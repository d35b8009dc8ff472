"""The page at `/`: a client of the API for people. Needs the extra `ui`; without it `/` says how to install that."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

if TYPE_CHECKING:
    from ldm2.serve.api import Api as Served

MISSING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ldm2</title><style>:root{color-scheme:light dark}body{font:16px system-ui,sans-serif;margin:3rem auto;
max-width:40rem;padding:0 1rem}</style><h1>ldm2</h1><p>The server runs. For the page, stop it and install the extra:</p>
<pre>pip install 'ldm2[ui]'</pre><p>The API needs nothing more: <a href="docs">docs</a>.</p></html>"""


def mount(app: FastAPI, key: str | None = None) -> bool:
    """Mount the page at `/` of a server's application -> whether gradio is there for it. key: of the API."""
    if importlib.util.find_spec("gradio") is None:
        app.add_api_route("/", _missing, include_in_schema=False)
        return False
    served: Served = app.state.api
    folder = served.jobs.folder.path / "page"
    folder.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)            # gradio knows no other way; it goes with the server's files
    from ldm2.serve.page import layout

    layout.mount(app, served, folder, key)
    return True


async def _missing() -> HTMLResponse:
    """What stands at `/` without gradio."""
    return HTMLResponse(MISSING)
