"""The nodes in integrations/comfyui, held to ComfyUI's contract without ComfyUI."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types

import numpy as np
import pytest
import torch

import ldm2
from ldm2.options import options_of
from ldm2.settings import EDITS, RESULTS, Settings
from tests.helpers import ROOT, tone

FOLDER = ROOT / "integrations" / "comfyui"
WIDGETS = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool, "STRING": str}


@pytest.fixture(scope="module")
def package():
    """The nodes as ComfyUI imports them: a package by its path."""
    spec = importlib.util.spec_from_file_location("comfyui_ldm2", FOLDER / "__init__.py",
                                                  submodule_search_locations=[str(FOLDER)])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith(spec.name)]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def classes(package):
    return package.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def pipe():
    return ldm2.load("tiny")


def defaults(node) -> dict[str, object]:
    """What the widgets of a node hold at first; inputs without a widget are left out."""
    inputs = node.INPUT_TYPES()
    every = inputs["required"] | inputs.get("optional", {})
    return {name: each[1]["default"] for name, each in every.items() if len(each) > 1}


def run(node, **inputs):
    """A node's function, called as ComfyUI does."""
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**inputs)


def sound(*shape: int) -> dict[str, object]:
    """An AUDIO of tones: (batch, channels, samples) at 8 kHz."""
    batch, channels, samples = shape
    waveform = torch.from_numpy(tone(samples / 8000, 8000))
    return {"waveform": waveform.expand(batch, channels, samples), "sample_rate": 8000}


def test_each_node_keeps_the_contract(package, classes):
    assert set(package.NODE_DISPLAY_NAME_MAPPINGS) == set(classes) and len(classes) == 1 + len(RESULTS)
    for node in classes.values():
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY == "audio/ldm2"
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert isinstance(node.IS_CHANGED(seed=1), str)
        for group, inputs in node.INPUT_TYPES().items():
            assert group in ("required", "optional")
            for kind, *rest in inputs.values():
                if isinstance(kind, list):
                    assert rest[0]["default"] in kind
                elif kind in WIDGETS:
                    assert isinstance(rest[0]["default"], WIDGETS[kind])
                    low, high = rest[0].get("min", -np.inf), rest[0].get("max", np.inf)
                    assert kind not in ("INT", "FLOAT") or low <= rest[0]["default"] <= high
                else:
                    assert kind in ("AUDIO", "LDM2_MODEL") and not rest


@pytest.mark.parametrize("task", RESULTS)
def test_a_node_has_each_option_of_its_task_and_its_defaults_change_nothing(classes, task):
    node = classes[f"LDM2{task.replace('_', ' ').title().replace(' ', '')}"]
    inputs = node.INPUT_TYPES()
    every = inputs["required"] | inputs["optional"]
    beside = {"model", "audio"} if task in EDITS else {"model"}
    assert set(every) == set(options_of(Settings, task)) - {"task"} | beside
    from_inputs = sys.modules["comfyui_ldm2.inputs"].settings_of(task, defaults(node))
    assert Settings.create(task, **from_inputs) == Settings.create(task, seed=0)


def test_what_is_written_in_inputs_is_what_settings_hold(classes):
    written = {"prompt": "rain", "times": "0.5:1, 2:", "bands": ":1000\n2000:4000", "prompt_at": "1:thunder\n2.5:wind",
               "guidance_interval": "0.1:0.8", "sampler": "euler", "steps": 7, "preset": "automatic", "paste": False}
    got = sys.modules["comfyui_ldm2.inputs"].settings_of("inpaint", written)
    assert Settings.create("inpaint", **got) == Settings.create(
        "inpaint", prompt="rain", times=[(0.5, 1), (2, None)], bands=[(None, 1000), (2000, 4000)], sampler="euler",
        prompt_at=[(1, "thunder"), (2.5, "wind")], guidance_interval=(0.1, 0.8), steps=7, paste=False)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"steps": -3}, "steps.*-3"), ({"seconds": 601.0}, "seconds.*601"), ({"eta": 2.0}, "eta.*2"),
    ({"prompt_at": "later:wind"}, "prompt_at.*later"),
    ({"sampler": "fastest"}, "sampler.*fastest"), ({"guidance_interval": "0.8:0.1"}, r"guidance_interval.*0\.8"),
    ({"guidance_scale": float("nan")}, "guidance_scale.*nan"),
])
def test_a_wrong_value_is_refused_before_the_run(classes, wrong, message):
    node = classes["LDM2Generate"]
    assert node.VALIDATE_INPUTS(**defaults(node)) is True
    refusal = node.VALIDATE_INPUTS(**defaults(node) | wrong)
    assert isinstance(refusal, str) and re.search(message, refusal)


def test_generate_returns_the_same_sound_as_the_pipeline(classes, pipe):
    node = classes["LDM2Generate"]
    audio, told = run(node, model=pipe, **defaults(node) | {
        "prompt": "a low bell", "seed": 5, "steps": 2, "seconds": 0.5, "num_waveforms": 2})
    expected = pipe.generate("a low bell", seed=5, steps=2, seconds=0.5, num_waveforms=2)
    assert audio["sample_rate"] == 16_000 and audio["waveform"].shape == (2, 1, 8000)
    assert audio["waveform"].dtype == torch.float32
    assert np.array_equal(audio["waveform"][:, 0].numpy(), expected.waveforms)
    assert [each["seed"] for each in json.loads(told)] == expected.seeds


def test_inpaint_keeps_what_lies_outside_of_each_clip(classes, pipe):
    audio, _ = run(classes["LDM2Inpaint"], model=pipe, audio=sound(2, 2, 8000), prompt="slow clicks", times="0.25:0.5",
                   seed=1, steps=2, keep_format=True)
    assert audio["waveform"].shape == (2, 2, 8000) and audio["sample_rate"] == 8000
    kept = torch.cat([audio["waveform"][..., :2000], audio["waveform"][..., 4000:]], -1)
    given = sound(2, 2, 8000)["waveform"]
    assert torch.equal(kept, torch.cat([given[..., :2000], given[..., 4000:]], -1))
    first, second = audio["waveform"][:, 0, 2500:3500]
    assert not torch.equal(first, second)                  # the seed counts on


@pytest.mark.parametrize("wrong", [None, {}, {"waveform": torch.zeros(8), "sample_rate": 8000},
                                   {"waveform": torch.zeros(0, 1, 8), "sample_rate": 8000}])
def test_an_input_that_is_no_sound_is_refused(classes, pipe, wrong):
    with pytest.raises(ValueError, match=r"audio must .*waveform"):
        run(classes["LDM2Transfer"], model=pipe, audio=wrong, prompt="rain", seed=0)


def test_progress_is_shown_and_cancel_stops_within_a_step(classes, pipe, monkeypatch):
    class Interrupted(Exception):
        pass

    shown = []

    def check():
        if len(shown) >= 3:
            raise Interrupted

    comfy, utils, management = (types.ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management"))
    utils.ProgressBar = lambda total: types.SimpleNamespace(update_absolute=lambda done, of: shown.append((done, of)))
    management.throw_exception_if_processing_interrupted = check
    comfy.utils, comfy.model_management = utils, management
    for module in (comfy, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(Interrupted):
        run(classes["LDM2Generate"], model=pipe, prompt="rain", seed=0, steps=50, seconds=0.5)
    assert len(shown) == 3


def test_the_workflow_runs(classes):
    """Each node after those that it is linked to; ComfyUI's own PreviewAudio stands at the ends."""
    nodes = json.loads((FOLDER / "workflow.json").read_text())
    made: dict[str, tuple] = {}
    for name, node in nodes.items():
        inputs = {key: made[value[0]][value[1]] if isinstance(value, list) else value
                  for key, value in node["inputs"].items()}
        if node["class_type"] == "PreviewAudio":
            assert inputs["audio"]["waveform"].shape == (1, 1, 32_000)
            continue
        required = set(classes[node["class_type"]].INPUT_TYPES()["required"])
        assert required <= set(inputs), name
        made[name] = run(classes[node["class_type"]], **inputs)
    assert [node["class_type"] for node in nodes.values()].count("PreviewAudio") == 3
