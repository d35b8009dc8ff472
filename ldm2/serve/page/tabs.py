"""The tabs Make and Long: a prompt or several over time -> sounds."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import gradio as gr

from ldm2.serve.page.api import Api, Failed, Job
from ldm2.serve.page.fields import Fields, as_text, component
from ldm2.serve.page.run import QUIET, Ask, Panel, Seed, Values, fields_and_seed

EXAMPLES = {
    "tiny": ("a rising sweep", "a low bell", "a fast drum beat", "wind blowing", "alarm beeps"),
    "": ("a dog barking in the rain", "techno music with a strong, upbeat tempo", "rain on a tin roof",
         "a cat purring", "an old clock ticking in an empty room"),
}
MOST_CHANGES = 6                           # prompts over time that the tab has rows for
LONGEST_SLIDER = 30.0                      # seconds; longer sound has a tab of its own


def examples(model: str) -> tuple[str, ...]:
    """Prompts that a model understands."""
    return EXAMPLES.get(model, EXAMPLES[""])


class Make:
    """A sound from a prompt."""

    def __init__(self, api: Api, capabilities: Mapping[str, Any], history: gr.State):
        prompts, fields = examples(capabilities["model"]["id"]), Fields(capabilities)
        most = capabilities["limits"]
        with gr.Row(elem_classes="ldm2-parts"):
            with gr.Column(elem_classes="ldm2-ask"):
                prompt = fields.add("prompt", gr.Textbox(
                    prompts[0], label="Prompt", info="what to hear", lines=2, placeholder=prompts[0]))
                with gr.Row(elem_classes="ldm2-examples"):
                    tries = [gr.Button(text, size="sm", min_width=80) for text in prompts[1:]]
                self.panel = Panel(api, history, "Make the sound")
            with gr.Column(elem_classes="ldm2-made"):
                self.panel.show("Press the button, or Ctrl+Enter. An example makes a sound at once.")
            with gr.Column(elem_classes="ldm2-more"):
                self.seed = Seed()
                with gr.Row():
                    fields.add("seconds", gr.Slider(
                        0.1, min(LONGEST_SLIDER, most["max_seconds"]), value=_default(fields, "seconds"), step=0.01,
                        label="Length", info="in seconds", min_width=200))
                    fields.add("num_waveforms", gr.Slider(
                        1, min(8, most["max_waveforms"]), value=1, step=1, label="Candidates",
                        info="best first by CLAP similarity", min_width=200))
                fields.add("negative_prompt", gr.Textbox(label="Negative prompt", info="what to steer away from",
                                                         max_lines=3, placeholder="low quality"))
                fields.add("preset", component(fields.options["preset"], ["generate"]))
                fields.advanced(["generate"], ["seed", "prompt_at", "loop"])
        self.fields, self.outputs = fields, fields_and_seed(fields, self.seed)
        inputs = set(fields.components.values())
        self.made = self.panel.wire(self.seed, inputs, lambda values: Ask("generate", fields.words("generate", values)))
        for button in tries:
            button.click(None, button, prompt, js=_TRY, **QUIET)

    def filled(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show settings."""
        return self.fields.filled(settings) | self.seed.filled(settings)


# An example is written into the prompt, and made as soon as it stands there.
_TRY = """text => { setTimeout(() => window.ldm2Make && window.ldm2Make(), 150); return text; }"""


def _default(fields: Fields, name: str) -> Any:
    """The value of an option of a new sound where it is not given."""
    return fields.options[name]["defaults"]["generate"]


class Long:
    """A long sound: prompts over time, or a loop, which is heard twice in a row."""

    def __init__(self, api: Api, capabilities: Mapping[str, Any], history: gr.State):
        self.api, fields = api, Fields(capabilities)
        most = capabilities["limits"]["max_seconds"]
        length = _default(fields, "seconds")
        prompts = examples(capabilities["model"]["id"])
        with gr.Row(elem_classes="ldm2-parts"):
            with gr.Column(elem_classes="ldm2-ask"):
                fields.add("prompt", gr.Textbox(prompts[0], label="Prompt", info="what to hear from the beginning",
                                                lines=1, max_lines=3))
                self.rows = [self._row(number, prompts, length) for number in range(1, MOST_CHANGES)]
                more = gr.Button("Another prompt later", size="sm")
                with gr.Row():
                    fields.add("seconds", gr.Slider(0.1, most, value=min(most, 2 * length), step=0.01, label="Length",
                                                    info="in seconds", min_width=200))
                    fields.add("loop", gr.Checkbox(label="Loop", info="the end continues at the beginning",
                                                   min_width=160))
                self.panel = Panel(api, history, "Make the long sound")
            with gr.Column(elem_classes="ldm2-made"):
                self.panel.show("Rain that becomes thunder, or a drum loop without a seam.")
                self.twice = gr.Audio(label="The loop, twice in a row", visible=False, interactive=False,
                                      buttons=["download"], elem_classes="ldm2-twice")
            with gr.Column(elem_classes="ldm2-more"):
                self.seed = Seed()
                fields.add("negative_prompt", gr.Textbox(label="Negative prompt", info="what to steer away from",
                                                         max_lines=3))
                fields.add("preset", component(fields.options["preset"], ["generate"]))
                fields.advanced(["generate"], ["seed", "prompt_at", "num_waveforms"])
        self.fields = fields
        self._wire(more)

    def _row(self, number: int, prompts: tuple[str, ...], length: float) -> tuple[Any, Any, Any]:
        """Inputs for a prompt from some time on -> the row, the time and the prompt."""
        with gr.Row(visible=number == 1) as row:
            start = gr.Textbox(f"{length * number:g}" if number == 1 else "", label="From (seconds)", min_width=100,
                               scale=1, max_lines=1)
            text = gr.Textbox("", label="Prompt from there on", placeholder=prompts[number % len(prompts)],
                              min_width=180, scale=3, max_lines=3)
        return row, start, text

    def _wire(self, more: gr.Button) -> None:
        """Let the buttons work."""
        shown = gr.State(1)
        rows = [row for row, _, _ in self.rows]

        def another(count: int) -> list[Any]:
            count = min(count + 1, len(rows))
            return [count, *(gr.update(visible=number < count) for number in range(len(rows)))]

        more.click(another, shown, [shown, *rows], **QUIET)
        changes = [each for _, start, text in self.rows for each in (start, text)]
        self.outputs = [*fields_and_seed(self.fields, self.seed), *changes, *rows]
        made = self.panel.wire(self.seed, {*self.fields.components.values(), *changes}, self._ask)
        made.then(self._twice, self.panel.history, self.twice, **QUIET)

    def _ask(self, values: Values) -> Ask:
        """What the inputs ask for."""
        words = self.fields.words("generate", values)
        for _, start, text in self.rows:
            prompt = str(values[text] or "").strip()
            at = str(values[start] or "").strip()
            if prompt and not at:
                raise Failed(f"prompt_at: from which second on is {prompt!r} to be heard?", "prompt_at")
            if prompt:
                words.append(("prompt_at", f"{at}:{prompt}"))
        return Ask("generate", words)

    async def _twice(self, history: list[Job]) -> Any:
        """The newest sound after itself, if it is a loop."""
        if not history or not history[0]["settings"].get("loop"):
            return gr.update(visible=False, value=None)
        import numpy as np
        import soundfile

        file = await self.api.content(history[0]["id"], 1)
        samples, rate = soundfile.read(io.BytesIO(file), dtype="int16")
        return gr.update(visible=True, value=(rate, np.concatenate([samples, samples])))

    def filled(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show settings."""
        changes = settings.get("prompt_at") or []
        updates = self.fields.filled(settings) | self.seed.filled(settings)
        for number, (row, start, text) in enumerate(self.rows):
            at, prompt = changes[number] if number < len(changes) else (None, "")
            updates |= {row: gr.update(visible=number <= len(changes)), start: as_text(at), text: prompt}
        return updates
