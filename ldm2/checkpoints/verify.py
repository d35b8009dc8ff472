"""A proof on the published weights: the samples that diffusers' tests expect of them, and what their files say.

diffusers' slow tests of AudioLDM2Pipeline (version 0.42, on a GPU and a CPU alike) pin ten samples of a sound for each
of these checkpoints and schedulers, where it is loudest. Whoever has a network can compute them here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm2.checkpoints import original
from ldm2.schedules import Schedule
from ldm2.settings import Sampling

if TYPE_CHECKING:
    from ldm2.pipeline import AudioLDM2

PROMPT = "A hammer hitting a wooden surface"
GUIDANCE_SCALE = 2.5
LATENTS = (1, 8, 128, 16)
NUM_SAMPLES = 81_952                                       # 128 latent frames, and the 32 that the vocoder makes beyond
TOLERANCE = 1e-3                                           # of diffusers' tests

# What each part is asked for, by the names in its JSON files; None stands for what a file does not say.
FACTS = {
    "unet": ("sample_size", "in_channels", "attention_head_dim", "num_attention_heads", "cross_attention_dim"),
    "vae": ("scaling_factor",),
    "vocoder": ("sampling_rate", "model_in_dim"),
    "scheduler": ("_class_name", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
                  "steps_offset", "set_alpha_to_one"),
    "language_model": ("max_new_tokens",),
    "text_encoder_2": ("model_type", "vocab_size"),
    "tokenizer_2": ("tokenizer_class", "symbols", "phonemize", "pad_token", "model_max_length"),
}
JSON_FILES = {"scheduler": "scheduler_config.json", "tokenizer_2": "tokenizer_config.json"}      # others: config.json


@dataclass(frozen=True)
class Pin:
    """Samples `first`, `first` + 1, ... of the sound that a checkpoint makes with a scheduler of diffusers.

    sampler: what ldm2 calls the scheduler.
    """

    model: str
    scheduler: str
    sampler: str
    steps: int
    first: int
    expected: tuple[float, ...]


PINS = (
    Pin("audioldm2", "DDIMScheduler", "ddim", 25, 17275,
        (0.0791, 0.0666, 0.1158, 0.1227, 0.1171, -0.2880, -0.1940, -0.0283, -0.0126, 0.1127)),
    Pin("audioldm2", "LMSDiscreteScheduler", "lms", 3, 31390,
        (-0.1318, -0.0577, 0.0446, -0.0573, 0.0659, 0.1074, -0.2600, 0.0080, -0.2190, -0.4301)),
    Pin("audioldm2-large", "DDIMScheduler", "ddim", 3, 8825,
        (-0.1829, -0.1461, 0.0759, -0.1493, -0.1396, 0.5783, 0.3001, -0.3038, -0.0639, -0.2244)),
)


@dataclass(frozen=True)
class Compared:
    """A pin beside what was computed. distance: the largest absolute difference of a sample."""

    pin: Pin
    found: tuple[float, ...]
    distance: float

    @property
    def agrees(self) -> bool:
        return self.distance < TOLERANCE


@dataclass(frozen=True)
class Keys:
    """The tensors of one part: how many its files hold, and the names of those that are dropped on purpose."""

    tensors: int
    dropped: tuple[str, ...]


def compare(pin: Pin, pipe: AudioLDM2, scheduler: Mapping[str, object]) -> Compared:
    """What `pipe`, loaded in float32 with reference="diffusers", makes of a pin. scheduler: its scheduler_config.json.

    Raises ValueError for a checkpoint of another shape than the published one.
    """
    shape = (1, *pipe.latent_shape_for_frames(LATENTS[2] * pipe.vae.config.downsampling))
    if shape != LATENTS:
        raise ValueError(f"the pinned samples need latents of the shape {LATENTS}, those of {pin.model} have {shape}")
    waveform = _sound(pin, pipe, Schedule.from_dict(dict(scheduler) | {"_class_name": pin.scheduler}))
    if len(waveform) != NUM_SAMPLES:
        raise ValueError(f"the pinned sound has {NUM_SAMPLES} samples, that of {pin.model} has {len(waveform)}")
    found = waveform[pin.first : pin.first + len(pin.expected)].astype(np.float64)
    distance = float(np.abs(found - pin.expected).max())
    return Compared(pin, tuple(found.tolist()), distance)


def _sound(pin: Pin, pipe: AudioLDM2, schedule: Schedule) -> np.ndarray:
    """All samples (N,) that the vocoder makes; `pipe.generate` would cut those beyond the length asked for."""
    start = torch.from_numpy(np.random.RandomState(0).standard_normal(LATENTS).astype(np.float32))
    conditioning = pipe.encode(PROMPT)
    how = Sampling(steps=pin.steps, guidance_scale=GUIDANCE_SCALE, sampler=pin.sampler)
    latents = pipe.denoise(conditioning, pipe.encode_unconditional(conditioning), start, how, schedule=schedule)
    return pipe.vocode(pipe.decode(latents))[0].numpy()


@contextmanager
def watched_keys() -> Iterator[dict[str, Keys]]:
    """By its name, each part that is loaded inside the `with` block, complete once that ends.

    Loading is strict: a tensor that is neither used nor dropped by name is an error. Of CLAP each branch is loaded by
    itself; dropped is what neither takes.
    """
    found: dict[str, Keys] = {}
    logger = logging.getLogger("ldm2.weights")
    handler, level = _Loads(found), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate, passed_on = False, logger.propagate
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed_on


class _Loads(logging.Handler):
    """Collects what ldm2.weights tells of each load: source, number of tensors, names of the dropped ones."""

    def __init__(self, found: dict[str, Keys]):
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        arguments: Any = record.args
        source, tensors, dropped = arguments
        name = re.split(r"[/\\ ]", str(source))[-1]
        before = self.found.get(name)
        kept = dropped if before is None else sorted(set(dropped) & set(before.dropped))
        self.found[name] = Keys(tensors, tuple(kept))


def facts(path: str | Path) -> dict[str, dict[str, object]]:
    """What a checkpoint (folder or authors' file) says: {part: {field: value}}, the fields of FACTS.

    Of tokenizer_2 "symbols" counts its entries. Raises ValueError for files that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        said = {part: _of_folder(path / part) for part in FACTS if (path / part).is_dir()}
    else:
        said = {part: content.fields for part, content in original.read(path).items() if part in FACTS}
    return {part: {name: fields.get(name) for name in FACTS[part]} for part, fields in said.items()}


def _of_folder(part: Path) -> dict:
    """The JSON of one part; of a tokenizer with the number of its symbols."""
    fields = _json(part / JSON_FILES.get(part.name, "config.json"))
    if part.name == "tokenizer_2":
        words, pieces = _json(part / "vocab.json"), _json(part / "tokenizer.json").get("model", {}).get("vocab")
        fields["symbols"] = len(words or pieces or ()) or None
    return fields


def _json(path: Path) -> dict:
    """The object in a file, empty if there is none."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def inferred(said: Mapping[str, Mapping[str, object]], native_latent_frames: int) -> dict[str, str]:
    """What this repository inferred about the published files without having seen them all, beside what these say.

    native_latent_frames: latent frames that ldm2 takes for the length of the training.
    """
    size = said.get("unet", {}).get("sample_size")
    lines = {"length": f"the file says sample_size {size}, ldm2 takes {native_latent_frames} latent frames"}
    model, tokenizer = said.get("text_encoder_2", {}), said.get("tokenizer_2", {})
    if model.get("model_type") == "vits" and tokenizer:
        symbols, known = tokenizer["symbols"], model["vocab_size"]
        verdict = "fits" if symbols == known else "is another model's"
        lines["tokenizer_2"] = f"{verdict}: {symbols} symbols, the model knows {known}"
    return lines


def scheduler(path: str | Path) -> dict:
    """All that a checkpoint (folder or authors' file) says about its noise schedule."""
    path = Path(path)
    if path.is_dir():
        return _json(path / "scheduler" / JSON_FILES["scheduler"])
    return original.read(path)["scheduler"].fields
