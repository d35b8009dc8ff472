"""The tab Edit: a sound from a file or the microphone, and what is to become of it."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ldm2 import audio
from ldm2.audio import spectrogram
from ldm2.serve.page import cards
from ldm2.serve.page.api import Api, Failed
from ldm2.serve.page.fields import Fields, component
from ldm2.serve.page.run import QUIET, Ask, Panel, Seed, Values, fields_and_seed
from ldm2.settings import MAX_SECONDS

KINDS = {
    "inpaint": ("Inpaint", "make a part of it again: drag over the picture to choose"),
    "transfer": ("Transfer", "as another prompt would have it"),
    "extend": ("Extend", "let it go on, or begin earlier"),
    "variations": ("Variations", "others that resemble it"),
    "super_resolution": ("Super-resolution", "make everything above a frequency anew"),
}
PEAKS = 400                                # of the drawn waveform
REGION = Path(__file__).with_name("region.js")


def region() -> gr.HTML:
    """A picture of a sound, in which parts are chosen: the event `select` tells them as "FROM:TO"."""
    return gr.HTML(
        {}, html_template="<canvas class='ldm2-canvas' role='img' aria-label='the sound'></canvas>", visible=False,
        elem_classes="ldm2-region", js_on_load=REGION.read_text(encoding="utf-8"))


class Edit:
    """A sound and what is to become of it."""

    def __init__(self, api: Api, capabilities: Mapping[str, Any], history: gr.State):
        self.api, fields = api, Fields(capabilities)
        kinds = [kind for kind in KINDS if kind in capabilities["kinds"]]
        with gr.Row(elem_classes="ldm2-parts"):
            with gr.Column(elem_classes="ldm2-ask"):
                self.sound = gr.Audio(label="A sound: upload it, record it, or press Edit below one that you made",
                                      type="filepath", sources=["upload", "microphone"], editable=False,
                                      buttons=["download"], elem_classes="ldm2-sound")
                self.told = gr.HTML("", elem_classes="ldm2-told")
                self.region = region()
                self.kind = gr.Radio([(KINDS[kind][0], kind) for kind in kinds], value=kinds[0], label="What to do",
                                     info=KINDS[kinds[0]][1], elem_classes="ldm2-kind")
                self._fields(fields, kinds)
                self.panel = Panel(api, history, "Make the edit")
            with gr.Column(elem_classes="ldm2-made"):
                self.panel.show("The edited sounds appear here.")
            with gr.Column(elem_classes="ldm2-more"):
                self.seed = Seed()
                fields.advanced(kinds, ["seed", "prompt_at"])
        self.fields = fields
        self.outputs = [*fields_and_seed(fields, self.seed), self.kind]
        self._wire(kinds[0])

    def _fields(self, fields: Fields, kinds: list[str]) -> None:
        """The inputs that matter most to one kind or another."""
        fields.add("prompt", gr.Textbox(label="Prompt", info="what the new sound is to be; may be empty for some",
                                        lines=1, max_lines=3))
        fields.add("times", gr.Textbox(label="Parts to make again (seconds)", placeholder="0.5:1.25",
                                       info="FROM:TO, several with commas between", elem_classes="ldm2-times"))
        for name in ("strength", "above", "seconds", "side", "num_waveforms"):
            each = fields.options[name]
            fields.add(name, component(each, [kind for kind in kinds if kind in each["kinds"]]))

    def _wire(self, first: str) -> None:
        """Let the inputs work together."""
        times: Any = self.fields.components["times"]
        parts = list(self.fields.components.values())
        self.sound.change(self._heard, [self.sound, times], [self.region, self.told], **QUIET)
        self.region.select(_chosen, None, times, **QUIET)
        times.input(None, times, None, js=_REDRAW, **QUIET)
        self.kind.change(self._shown, self.kind, [self.kind, self.region, *parts], **QUIET)
        self.panel.wire(self.seed, {*parts, self.sound, self.kind}, self._ask)
        for name, fits in self.fields.applicable(first).items():
            self.fields.components[name].visible = fits

    def _shown(self, kind: str) -> list[Any]:
        """Show the inputs that a kind takes."""
        fits = self.fields.applicable(kind)
        return [gr.update(info=KINDS[kind][1]), gr.update(elem_classes=_region_classes(kind)),
                *(gr.update(visible=fits[name]) for name in self.fields.components)]

    def _heard(self, path: str | None, times: str) -> tuple[Any, str]:
        """Draw a sound."""
        if path is None:
            return gr.update(visible=False, value={}), ""
        try:
            channels, rate = audio.read_channels(path, MAX_SECONDS)
        except (ValueError, OSError) as error:
            return gr.update(visible=False, value={}), cards.failure(str(error).replace(f"{Path(path).parent}/", ""))
        return gr.update(visible=True, value=drawn(channels.mean(axis=0), rate) | {"times": times or ""}), ""

    def _ask(self, values: Values) -> Ask:
        """What the inputs ask for."""
        kind, path = values[self.kind], values[self.sound]
        if path is None:
            raise Failed("there is no sound yet: upload or record one above", "audio")
        return Ask(kind, self.fields.words(kind, values), Path(path))

    async def take(self, job: str, n: int, folder: Path) -> str:
        """A sound that was made, as a file to edit."""
        content = await self.api.content(job, n)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{job[:12]}-{n}-", suffix=".wav", delete=False) as file:
            file.write(content)
        return file.name

    def filled(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show settings."""
        kind = settings.get("task", "inpaint")
        updates = self.fields.filled(settings) | self.seed.filled(settings) | {self.kind: kind}
        fits = self.fields.applicable(kind)
        for name, each in self.fields.components.items():
            updates[each] = updates[each] | {"visible": fits[name]}
        return updates


# Typing in the text of the parts moves them in the picture.
_REDRAW = "text => { window.dispatchEvent(new CustomEvent('ldm2-times', {detail: text})); }"


def _region_classes(kind: str) -> list[str]:
    """Classes of the picture: parts are chosen in it for one kind only."""
    return ["ldm2-region", *(["ldm2-plain"] if kind != "inpaint" else [])]


def _chosen(event: gr.EventData) -> str:
    """The parts that were dragged over, as their text. Whatever a browser may send stays words of numbers."""
    return re.sub(r"[^\d.:, ]", "", str(getattr(event, "times", "")))[:200]


def drawn(waveform: Any, sample_rate: int) -> dict[str, Any]:
    """What the picture of a waveform (N,) is drawn of: peaks, a spectrogram, its length in seconds."""
    import numpy as np

    edges = np.linspace(0, len(waveform), min(PEAKS, len(waveform)) + 1).astype(int)[:-1]
    peaks = np.maximum.reduceat(np.abs(waveform), edges)
    picture = base64.b64encode(spectrogram.waveform_png(waveform, sample_rate)).decode()
    return {"seconds": len(waveform) / sample_rate, "peaks": [round(float(peak), 3) for peak in peaks],
            "picture": f"data:image/png;base64,{picture}"}
