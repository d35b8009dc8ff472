"""Inputs for the options of a request, made of what /v1/capabilities says of them, and their values as words.

What is left empty is not sent: then the preset, the model or the default decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

Option = dict[str, Any]                    # as /v1/capabilities lists them

LABELS = {"num_waveforms": "Candidates"}


class Fields:
    """The options of some kinds of request, and a component for each that is asked for."""

    def __init__(self, capabilities: Mapping[str, Any]):
        self.options: dict[str, Option] = {each["name"]: each for each in capabilities["options"]}
        self.components: dict[str, gr.components.Component] = {}

    def add(self, name: str, component: gr.components.Component) -> Any:
        """Take a component for an option -> it."""
        self.components[name] = component
        return component

    def advanced(self, kinds: Sequence[str], without: Sequence[str]) -> None:
        """Components for the other options of some kinds, in a folded part of the page."""
        with gr.Accordion("Advanced", open=False, elem_classes="ldm2-advanced"), gr.Row():
            for name, each in self.options.items():
                fits = any(kind in each["kinds"] for kind in kinds) and each["group"] != "output"
                if fits and name not in self.components and name not in without:
                    self.add(name, component(each, kinds))

    def applicable(self, kind: str) -> dict[str, bool]:
        """Which of the components the options of a kind have."""
        return {name: kind in self.options[name]["kinds"] for name in self.components}

    def words(self, kind: str, values: Mapping[Any, Any]) -> list[tuple[str, str]]:
        """What is to be sent of the components' values, as fields of a form."""
        fits = self.applicable(kind)
        return [(name, word) for name, each in self.components.items() if fits[name] and each in values
                for word in words(self.options[name], values[each])]

    def filled(self, settings: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that show settings; what they do not say is emptied, or stands at a slider's first value."""
        updates: dict[Any, Any] = {}
        for name, each in self.components.items():
            value = settings.get(name)
            if isinstance(each, gr.Slider):
                updates[each] = gr.update(value=each.value if value is None else value)
            else:
                updates[each] = gr.update(value=shown(self.options[name], value))
        return updates


def component(option: Option, kinds: Sequence[str]) -> gr.components.Component:
    """An input for an option; its default stands in it where it is empty."""
    schema, name = option["schema"], option["name"]
    label = LABELS.get(name, name.replace("_", " ").capitalize())
    label += f" ({option['unit']})" if option.get("unit") else ""
    about: dict[str, Any] = {"label": label, "info": option["help"], "min_width": 240}
    if option["flag"]:
        return gr.Checkbox(value=bool(option["default"]), **about)
    if "enum" in schema:
        return gr.Dropdown([("automatic", ""), *schema["enum"]], value="", **about)
    defaults = {kind: option["defaults"].get(kind) for kind in kinds}
    same = len({str(value) for value in defaults.values()}) == 1
    hint = as_text(next(iter(defaults.values()))) if same else ""
    return gr.Textbox(value="", placeholder=hint or "automatic", max_lines=1, **about)


def words(option: Option, value: Any) -> list[str]:
    """The words of a form that a component's value is; none where it is empty, or what it would be anyway."""
    if value is None or value == "":
        return []
    if option["flag"]:
        return [] if value == bool(option["default"]) else ["true" if value else "false"]
    if isinstance(value, (int, float)):
        return [f"{value:.15g}"]
    text = str(value).strip()
    pairs = option["schema"].get("items", {}).get("type") == "array" and not text.startswith("[")
    several = [part.strip() for part in text.split(",")] if pairs and option["name"] != "prompt_at" else [text]
    return [part for part in several if part]


def shown(option: Option, value: Any) -> Any:
    """What a component shows for a value of settings."""
    if option["flag"]:
        return bool(option["default"] if value is None else value)
    return as_text(value)


def as_text(value: Any) -> str:
    """A value as people write it: a pair as FROM:TO, several with commas between them."""
    if value is None:
        return ""
    if not isinstance(value, (list, tuple)):
        return f"{value:.15g}" if isinstance(value, float) else str(value)
    pair = len(value) == 2 and not any(isinstance(each, (list, tuple)) for each in value)
    return (":" if pair else ", ").join(as_text(each) for each in value)
