"""The page as a whole: its head, its tabs, its looks; and how it is mounted."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.routing import Mount

from ldm2 import __version__
from ldm2.checkpoints.known import MODELS
from ldm2.serve import schemas
from ldm2.serve.page.api import Api
from ldm2.serve.page.edit import Edit
from ldm2.serve.page.past import History
from ldm2.serve.page.tabs import Long, Make

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ldm2.serve.api import Api as Served

HERE = Path(__file__).parent
FONT = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
SECONDS_KEPT = 3600                        # of gradio's copies of sounds


def mount(app: FastAPI, served: Served, folder: Path, key: str | None) -> None:
    """Put the page at `/` of an application, behind its routes. Nothing on it comes from another host."""
    page = build(Api(app, key), schemas.capabilities(served.about, served.limits), folder)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    gr.mount_gradio_app(
        app, page, "/", theme=gr.themes.Default(primary_hue="sky", font=FONT, font_mono=MONO),
        css_paths=HERE / "page.css", head=f"<script>{script}</script>", footer_links=[], run_history=False,
        ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, max_file_size=served.limits.upload_bytes)
    mounted: Any = next(route.app for route in reversed(app.routes) if isinstance(route, Mount))
    app.state.stopping.append(mounted.stop_event.set)      # ends the streams that open windows keep


def build(api: Api, capabilities: Mapping[str, Any], folder: Path) -> gr.Blocks:
    """The page. folder: for sounds that go from tab to tab."""
    with gr.Blocks(title="ldm2", analytics_enabled=False, delete_cache=(600, SECONDS_KEPT)) as page:
        gr.HTML(head(capabilities["model"]))
        history, told = gr.State([]), gr.HTML("", elem_classes="ldm2-told")
        with gr.Tabs(selected="make") as tabs:
            with gr.Tab("Make", id="make"):
                make = Make(api, capabilities, history)
            with gr.Tab("Edit", id="edit"):
                edit = Edit(api, capabilities, history)
            with gr.Tab("Long", id="long"):
                long = Long(api, capabilities, history)
            with gr.Tab("History", id="history"):
                History(api, history, tabs, told, folder, make, edit, long, capabilities["model"]["id"])
    page.queue(default_concurrency_limit=None)
    return page


def head(model: Mapping[str, Any]) -> str:
    """What the page is, and the model that is loaded with its license."""
    known = next((each for each in MODELS if model["id"] in (each.name, each.repo, *each.aliases)), None)
    about = [f"{model['sample_rate'] / 1000:g} kHz", str(model.get("device", "")), str(model.get("dtype", ""))]
    if known is not None:
        about = [known.task, known.license, *about]
    hint = ("A small model for trying things out: it knows tones, sweeps, sirens, noises, clicks, drums, bells, "
            "plucked notes and beeps. For real audio: <code>ldm2 serve --model audioldm2</code>."
            if model["id"] == "tiny" else "")
    return (f"<header class='ldm2-head'><h1>ldm2</h1><p><b>{escape(str(model['id']))}</b> "
            f"<span>{escape(' · '.join(filter(None, about)))}</span></p>"
            f"<p class='ldm2-hint'>{hint} <a href='docs' target='_blank'>API</a> · {__version__}</p></header>")
