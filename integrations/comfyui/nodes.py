"""The nodes: a model, and one for each task that makes sound. Sound is ComfyUI's AUDIO:

{"waveform": float32 (batch, channels, samples) within -1..1, "sample_rate": Hz}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

import ldm2
from ldm2.checkpoints.known import MODELS
from ldm2.settings import EDITS, GENERATE, RESULTS

from .inputs import AUTOMATIC, inputs_of, settings_of

CATEGORY = "audio/ldm2"
MODEL = "LDM2_MODEL"
Audio = dict[str, Any]


class LoadModel:
    """A model, loaded once and kept while its inputs stay the same."""

    CATEGORY = CATEGORY
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    DESCRIPTION = "Loads a checkpoint; a published one is downloaded on first use. Mind its license: `ldm2 models`."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        names = [each.name for each in MODELS]
        tips = [f"{each.name}: {each.task}, {each.license}" for each in MODELS]
        return {
            "required": {"name": (names, {"default": "audioldm2", "tooltip": "; ".join(tips)})},
            "optional": {
                "path": ("STRING", {"default": "", "tooltip": "a folder, a .pth file or a hub name, in place of name"}),
                "dtype": (["auto", "float32", "float16", "bfloat16"], {"default": "auto"}),
                "device": (["auto", "cuda", "mps", "cpu"], {"default": "auto"}),
                "low_memory": ("BOOLEAN", {"default": False, "tooltip": "keep a part in memory while it works only"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return ldm2.__version__

    def load(self, name: str, path: str = "", **options: Any) -> tuple[ldm2.AudioLDM2]:
        with _Watched() as watched:
            return (ldm2.load(path.strip() or name, progress=watched.report, **options),)


class Make:
    """What the nodes that make sound share; `task` says which of ldm2's tasks it is."""

    task = GENERATE
    CATEGORY = CATEGORY
    RETURN_TYPES = ("AUDIO", "STRING")
    RETURN_NAMES = ("audio", "settings")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        inputs = inputs_of(cls.task)
        sound = {"audio": ("AUDIO",)} if cls.task in EDITS else {}
        return {"required": {"model": (MODEL,), **sound, **inputs["required"]}, "optional": inputs["optional"]}

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool | str:
        """Whether the values that are known before the run are possible; those from other nodes are not yet."""
        try:
            settings_of(cls.task, inputs)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        """The same inputs make the same sound, as long as ldm2 is the same."""
        return ldm2.__version__

    def make(self, model: ldm2.AudioLDM2, audio: Audio | None = None, **inputs: Any) -> tuple[Audio, str]:
        """The sound (batch, channels, samples), and the settings of each waveform as JSON."""
        settings = settings_of(self.task, inputs)
        function: Callable[..., ldm2.Result] = getattr(model, self.task)
        with _Watched() as watched:
            if self.task not in EDITS:
                return _returned([function(**settings, progress=watched.report)])
            results: list[ldm2.Result] = []
            for sound, rate in _clips(audio):              # the seed counts on from clip to clip
                own = settings | {"seed": settings.get("seed", 0) + sum(map(len, results))}
                results.append(function(sound, sample_rate=rate, **own, progress=watched.report))
            return _returned(results)


def _clips(audio: Audio | None) -> list[tuple[torch.Tensor, int]]:
    """The sounds (channels, N) of an AUDIO, each with its rate. Raises ValueError for what is none."""
    if not isinstance(audio, dict) or "waveform" not in audio or "sample_rate" not in audio:
        raise ValueError("audio must be a sound: {'waveform': (batch, channels, samples), 'sample_rate': Hz}")
    waveform = audio["waveform"]
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 3 or 0 in waveform.shape:
        raise ValueError(f"audio must have a waveform (batch, channels, samples), got {_shape(waveform)}")
    return [(clip.detach().float().cpu(), int(audio["sample_rate"])) for clip in waveform]


def _shape(value: Any) -> str:
    """The shape of a tensor, or the type of something else."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _returned(results: list[ldm2.Result]) -> tuple[Audio, str]:
    """Results of equal length as a node returns them."""
    sound = torch.cat([torch.from_numpy(each.channels).float() for each in results])
    told = [one.settings for each in results for one in each]
    return {"waveform": sound, "sample_rate": results[0].sample_rate}, json.dumps(told[0] if len(told) == 1 else told)


class _Watched:
    """ComfyUI's progress bar and its Cancel button; outside of ComfyUI neither is there."""

    def __enter__(self) -> _Watched:
        try:
            from comfy import model_management, utils

            self._check, self._bar = model_management.throw_exception_if_processing_interrupted, utils.ProgressBar(1)
        except ImportError:
            self._check, self._bar = (lambda: None), None
        return self

    def __exit__(self, *error: object) -> None:
        self._bar = None

    def report(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; raises ComfyUI's own exception if the user has cancelled."""
        self._check()
        if self._bar is not None:
            self._bar.update_absolute(done, max(total, 1))


def _node(name: str, its_task: str) -> type[Make]:
    """The class of a task's node."""
    words = its_task.replace("_", " ")
    about = f"{words.capitalize()} with AudioLDM2. Numbers of 0 or -1 and '{AUTOMATIC}' leave the choice to the model."
    return type(name, (Make,), {"task": its_task, "DESCRIPTION": about, "__module__": __name__})


TITLES = {task: task.replace("_", " ").title() for task in RESULTS}
NODE_CLASS_MAPPINGS: dict[str, type] = {"LDM2LoadModel": LoadModel} | {
    f"LDM2{title.replace(' ', '')}": _node(title.replace(" ", ""), task) for task, title in TITLES.items()
}
NODE_DISPLAY_NAME_MAPPINGS = {"LDM2LoadModel": "ldm2 Load Model"} | {
    f"LDM2{title.replace(' ', '')}": f"ldm2 {title}" for title in TITLES.values()
}
