"""What each tab has that makes a sound: its buttons, how far it is, the sounds, and how a job is sent and followed."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ldm2.serve.page import cards
from ldm2.serve.page.api import LIVE, Api, Failed, Job
from ldm2.serve.page.fields import Fields

Values = Mapping[Any, Any]
MOST_KEPT = 100                            # jobs of a window


@dataclass
class Ask:
    """What a tab asks for: the kind of job, its options as words, and the sound to edit."""

    kind: str
    words: list[tuple[str, str]]
    audio: Path | None = None


class Seed:
    """A seed that is drawn anew for each sound, unless it is locked. It is a text: it may have 20 digits."""

    def __init__(self) -> None:
        with gr.Row(elem_classes="ldm2-seed"):
            self.text = gr.Textbox(value=_draw, label="Seed", info="the same seed makes the same sound", min_width=140,
                                   scale=3, max_lines=1)
            dice = gr.Button("Dice", size="sm", min_width=64, scale=1, elem_classes="ldm2-dice")
            self.lock = gr.Checkbox(label="Lock", min_width=80, scale=1, container=False)
        dice.click(_draw, None, self.text, **QUIET)

    def next(self, values: Values) -> str:
        """The seed of the next sound. Raises Failed where it is locked and empty."""
        if not values[self.lock]:
            return _draw()
        if not str(values[self.text] or "").strip():
            raise Failed("seed is locked and empty: write a number, or take the lock off", "seed")
        return str(values[self.text]).strip()

    def filled(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show the seed of settings, locked."""
        seed = settings.get("seed")
        return {} if seed is None else {self.text: str(seed), self.lock: True}


# Of events that are the page's own affair: any number at once, no overlay, not among the programs' endpoints.
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


def _draw() -> str:
    """A new seed."""
    return str(secrets.randbelow(2**31))


class Panel:
    """The lower part of a tab. `outputs` are its components, `history` the jobs of the window, the newest first."""

    def __init__(self, api: Api, history: gr.State, label: str):
        self.api, self.history = api, history
        self.job = gr.State(None)
        with gr.Row():
            self.make = gr.Button(label, variant="primary", elem_classes="ldm2-make", scale=3, min_width=160)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_classes="ldm2-stop", scale=1,
                                  min_width=80)
        self.seed: Any = None
        self.status: Any = None
        self.results: Any = None

    def show(self, empty: str) -> None:
        """Place what tells how far a job is, and its sounds; `empty` stands there at first."""
        self.status = gr.HTML("", elem_classes="ldm2-state")
        self.results = cards_place(cards.EMPTY.format(empty))

    def wire(self, seed: Seed, inputs: set[Any], ask: Callable[[Values], Ask]) -> Any:
        """Let the buttons work -> the event of making. ask: values of the components -> what to ask for."""
        self.seed = seed
        seen = {*inputs, seed.text, seed.lock, self.history}

        async def run(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            async for updates in self._run(values, ask, request):
                yield updates

        outputs = [self.status, self.results, self.job, self.make, self.stop, self.history, self.seed.text]
        self.stop.click(self._stop, self.job, self.status, **QUIET)
        return self.make.click(run, seen, outputs, trigger_mode="once", **QUIET)

    async def _run(
        self, values: dict[Any, Any], ask: Callable[[Values], Ask], request: gr.Request
    ) -> AsyncIterator[dict[Any, Any]]:
        """Send a job and follow it -> updates of the page. A window that is closed cancels its job."""
        job: Job | None = None
        try:
            seed, asked = self.seed.next(values), ask(values)
            fields = [("kind", asked.kind), ("seed", seed), *asked.words]
            job = await self.api.submit(fields, asked.audio, request)
            yield {self.seed.text: seed, self.job: job["id"], self.make: gr.update(interactive=False),
                   self.stop: gr.update(interactive=True), self.status: cards.progress(job)}
            async for now in self.api.follow(job):
                job = now
                if job["status"] in LIVE:
                    yield {self.status: cards.progress(job)}
            yield self._ended(job, values[self.history])
        except Failed as error:
            yield {self.status: cards.failure(str(error)), **self._idle()}
        finally:
            if job is not None and job["status"] in LIVE:
                await self.api.cancel(job["id"])

    def _ended(self, job: Job, history: list[Job]) -> dict[Any, Any]:
        """Updates for a job that has ended."""
        if job["status"] == "completed":
            kept = [job, *history][:MOST_KEPT]
            return {self.status: "", self.results: cards.cards(job), self.history: kept, **self._idle()}
        if job["status"] == "cancelled":
            return {self.status: cards.note("Stopped. Nothing was kept of it."), **self._idle()}
        return {self.status: cards.failure((job.get("error") or {}).get("message", "failed")), **self._idle()}

    def _idle(self) -> dict[Any, Any]:
        """Updates of the buttons when nothing runs."""
        return {self.make: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.job: None}

    async def _stop(self, job: str | None) -> Any:
        """Cancel the job that runs; `_run` sees it end."""
        if job is None:
            return gr.update()
        await self.api.cancel(job)
        return cards.note("Stopping ...")


def cards_place(value: str) -> gr.HTML:
    """HTML whose buttons with data-action raise the event `select`, with what stands in their data."""
    return gr.HTML(value, elem_classes="ldm2-results", js_on_load="""
        element.addEventListener('click', event => {
            const button = event.target.closest('button[data-action]');
            if (button) trigger('select', {...button.dataset});
        });""")


def fields_and_seed(fields: Fields, seed: Seed) -> list[Any]:
    """The components that settings fill."""
    return [*fields.components.values(), seed.text, seed.lock]
