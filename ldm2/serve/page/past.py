"""The tab History: every sound of this window, and files of earlier ones whose settings are taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ldm2.serve.page import cards
from ldm2.serve.page.api import Api, Failed, Job
from ldm2.serve.page.edit import Edit
from ldm2.serve.page.run import QUIET, cards_place
from ldm2.serve.page.tabs import LONGEST_SLIDER, Long, Make

SUFFIXES = [".wav", ".flac", ".mp3", ".ogg", ".opus", ".json", ".toml"]


class History:
    """The sounds of a window; `tabs` are where settings are shown again."""

    def __init__(self, api: Api, history: gr.State, tabs: gr.Tabs, told: gr.HTML, folder: Path, make: Make,
                 edit: Edit, long: Long, model: str):
        self.api, self.folder, self.tabs, self.told = api, folder, tabs, told
        self.make, self.edit, self.long, self.model = make, edit, long, model
        self.file = gr.File(label="Drop a file here that ldm2 wrote: its settings are shown again", height=120,
                            file_types=SUFFIXES, elem_classes="ldm2-file")
        self.list = cards_place(cards.listed([]))
        history.change(cards.listed, history, self.list, **QUIET)
        self._wire()

    def _wire(self) -> None:
        """Let dropped files and the buttons of all cards work."""
        shown = {*self.make.outputs, *self.edit.outputs, *self.long.outputs, self.edit.sound, self.tabs, self.told}
        self.file.upload(self._dropped, self.file, [*shown, self.file], **QUIET)
        for place in (self.list, self.make.panel.results, self.edit.panel.results, self.long.panel.results):
            place.select(self._pressed, None, [*shown], **QUIET)

    async def _dropped(self, path: str) -> dict[Any, Any]:
        """Show the settings in a file."""
        try:
            settings = await self.api.settings(Path(path))
        except Failed as error:
            return {self.told: cards.failure(str(error)), self.file: None}
        made = settings.get("model")
        other = "" if made in (None, self.model) else f" They are of the model {made}, this is {self.model}."
        input = " Give its sound too." if self._tab(settings) == "edit" else ""
        words = f"The settings of {Path(path).name} are back.{input}{other}"
        return self.shown(settings) | {self.told: cards.note(words), self.file: None}

    async def _pressed(self, event: gr.EventData) -> dict[Any, Any]:
        """A button of a card: change its settings, or edit its sound."""
        try:
            name, n = str(event.job), int(event.n)
            if event.action == "edit":
                path = await self.edit.take(name, n, self.folder)
                return {self.edit.sound: path, self.tabs: gr.Tabs(selected="edit"), self.told: ""}
            job: Job = await self.api.job(name)
            seed = {"seed": job["results"][n - 1]["seed"], "num_waveforms": 1} if job["results"] else {}
            return self.shown(job["settings"] | seed) | {self.told: ""}
        except (Failed, AttributeError, ValueError, IndexError) as error:
            return {self.told: cards.failure(str(error))}

    def _tab(self, settings: dict[str, Any]) -> str:
        """The tab that settings belong to."""
        if settings.get("task", "generate") != "generate":
            return "edit"
        is_long = settings.get("loop") or settings.get("prompt_at") or (settings.get("seconds") or 0) > LONGEST_SLIDER
        return "long" if is_long else "make"

    def shown(self, settings: dict[str, Any]) -> dict[Any, Any]:
        """Updates that show settings in their tab, which is opened."""
        name = self._tab(settings)
        tab: Any = {"make": self.make, "edit": self.edit, "long": self.long}[name]
        return tab.filled(settings) | {self.tabs: gr.Tabs(selected=name)}
