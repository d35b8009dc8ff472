"""What is computed once of clips and captions: latents and conditionings, kept in files.

A file's name is a digest of all that it depends on: the bytes of the sound (not its path or date), the model's files,
and the settings. So a changed sound is encoded again, and equal ones are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm2 import atomic, audio
from ldm2.batch.rows import canonical, digest
from ldm2.conditioning import Conditioning
from ldm2.fields import sha256_of
from ldm2.noise import SeededNoise
from ldm2.pipeline import AudioLDM2
from ldm2.settings import MAX_SECONDS
from ldm2.stages import Stages
from ldm2.training.data import Clip, Data

VERSION = 1                                # of what is in the files
EXACT = -30.0                              # logarithm of the variance of latents that are known
AT_ONCE = 8                                # sounds that a model makes together

Text = tuple[str, "str | None"]            # a caption, and what is said
Report = Callable[[str, int, int], object]


class Store:
    """Tensors in files by their keys. A file is there as a whole or not at all; a damaged one counts as not there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the tensors of a key are."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether they can be read."""
        try:
            self.get(key)
        except OSError:
            return False
        return True

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key. Raises OSError."""
        try:
            return load_file(self.path(key))
        except (SafetensorError, ValueError) as error:
            raise OSError(f"{self.path(key)} is damaged ({error}): remove it and run again") from error

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors. Raises OSError where the disk is full."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.whole(path, overwrite=True) as temporary:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            except SafetensorError as error:
                raise OSError(f"{path} could not be written, is the disk full? ({error})") from error


@dataclass(frozen=True)
class Example:
    """The keys of a clip's latents, and of the conditionings that go with them."""

    latents: str
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """Encoded clips. nothing: the key of the unconditional side. skipped: one line for each clip that is left out."""

    all: tuple[Example, ...]
    nothing: str
    skipped: tuple[str, ...]


def encode(
    pipe: Stages, model: str, data: Data, frames: int, store: Store, strict: bool, report: Report
) -> Examples:
    """Clips -> what the UNet is trained on, from the store where it is there.

    model: a digest of the files that the pipe is made from. frames: latent frames of a crop, to which shorter clips are
    continued with silence. strict: raise for a clip that cannot be read.
    Raises ValueError or OSError, one line.
    """
    basis = basis_of(pipe, model)
    examples: list[Example] = []
    skipped: list[str] = []
    with pipe.stages["vae"]:
        for done, clip in enumerate(data.clips):
            report("encoding sounds", done, len(data.clips))
            latents = encode_sound(pipe, clip.path, frames, basis, store, None if strict else skipped)
            if latents is None:
                continue
            keys = [key_of("text", *basis, caption, clip.transcription) for caption in clip.captions]
            examples.append(Example(latents, tuple(keys)))
    if not examples:
        raise ValueError(f"none of {len(data.clips)} clips can be read: {skipped[0]}")
    return Examples(tuple(examples), _encode_texts(pipe, data, basis, store, report), (*data.skipped, *skipped))


def own_sounds(
    pipe: AudioLDM2, model: str, prompts: Sequence[str], frames: int, store: Store, report: Report
) -> list[Example]:
    """What the model itself makes of prompts, as examples; from the store where it is there."""
    basis = basis_of(pipe, model)
    keys = [key_of("own", *basis, prompt, number, frames) for number, prompt in enumerate(prompts)]
    texts = encode_sides(pipe, [(prompt, None) for prompt in prompts], basis, store, report)
    shape = pipe.latent_shape_for_frames(frames * pipe.vae.config.downsampling)
    with pipe.stages["unet"]:
        for first in range(0, len(keys), AT_ONCE):
            report("making sounds to keep", first, len(keys))
            numbers = range(first, min(first + AT_ONCE, len(keys)))
            if all(store.has(keys[number]) for number in numbers):
                continue
            sides = [join_rows(store, [texts[prompts[number], None][side] for number in numbers]) for side in (0, 1)]
            noise = SeededNoise(numbers)
            latents = pipe.denoise(*sides, noise.draw(*shape), noise=noise).float().cpu()
            for number, mean in zip(numbers, latents / pipe.vae.config.scaling_factor):
                store.put(keys[number], {"mean": mean, "logvar": torch.full_like(mean, EXACT)})
    return [Example(key, texts[prompt, None][:1]) for key, prompt in zip(keys, prompts)]


def encode_sides(
    pipe: Stages, texts: Iterable[Text], basis: list, store: Store, report: Report
) -> dict[Text, tuple[str, str]]:
    """The keys of the conditional and the unconditional side of captions with what is said, which are in the store."""
    keys = {text: (key_of("text", *basis, *text), key_of("unconditional", *basis, *text)) for text in texts}
    missing = [text for text, both in keys.items() if not all(map(store.has, both))]
    if missing:
        with pipe.stages["text"]:
            for done, (caption, spoken) in enumerate(missing):
                report("encoding captions", done, len(missing))
                row = encode_text(pipe, caption, spoken, Clip(Path(caption), ()))
                keep(store, keys[caption, spoken][0], row)
                keep(store, keys[caption, spoken][1], pipe.encode_unconditional(row, transcription=spoken))
    return keys


def join_rows(store: Store, keys: Iterable[str]) -> Conditioning:
    """What keys of texts stand for, a row each."""
    return Conditioning.join([conditioning(store, key) for key in keys])


def model_digest(path: Path) -> str:
    """Tells a checkpoint by where it is, and the sizes and dates of its files."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return digest(canonical(stamps))


def conditioning(store: Store, key: str) -> Conditioning:
    """What a key of a text stands for: one row."""
    tensors = store.get(key)
    count = sum(name.startswith("context") for name in tensors)
    contexts = tuple(tensors[f"context{i}"] for i in range(count))
    return Conditioning(contexts, tuple(tensors.get(f"mask{i}") for i in range(count)), tensors.get("film"))


def basis_of(pipe: Stages, model: str) -> list[object]:
    """What every key depends on. model: a digest of the files that the pipe is made from."""
    return [VERSION, model, pipe.reference, str(pipe.dtype)]


def encode_sound(
    pipe: Stages, path: Path, frames: int, basis: list, store: Store, skipped: list[str] | None
) -> str | None:
    """The key of a sound's latents: mean and log variance (C, T/f, F/f), at least `frames` long, not scaled.

    skipped: takes a line for a sound that cannot be read, whose key is None; without it ValueError or OSError is
    raised. What the store cannot keep is raised anyway.
    """
    try:
        return _encode_sound(pipe, path, frames, basis, store)
    except (ValueError, OSError) as error:
        if skipped is None or str(store.folder) in str(error):
            raise
        skipped.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None


def _encode_sound(pipe: Stages, path: Path, frames: int, basis: list, store: Store) -> str:
    key = key_of("latents", *basis, sha256_of(path), frames)
    if not store.has(key):
        channels, rate = audio.read_channels(path, MAX_SECONDS)
        waveform = audio.resample(audio.mix(channels).astype(np.float32), rate, pipe.sample_rate)
        missing = max(0, frames * pipe.samples_per_latent_frame - len(waveform))
        posterior = pipe.posterior(np.pad(waveform, (0, missing)), pipe.sample_rate)
        if not torch.isfinite(posterior.mean).all():
            raise ValueError(f"{path}: its latents are not finite")
        store.put(key, {"mean": posterior.mean[0].cpu(), "logvar": posterior.logvar[0].cpu()})
    return key


def _encode_texts(pipe: Stages, data: Data, basis: list, store: Store, report: Report) -> str:
    """Put all captions into the store, and the unconditional side, whose key this returns."""
    texts = data.texts
    missing = {key_of("text", *basis, *text): (text, clip) for text, clip in texts.items()}
    nothing = key_of("text", *basis, "", None)
    missing = {key: text for key, text in missing.items() if not store.has(key)}
    if missing or not store.has(nothing):
        with pipe.stages["text"]:
            for done, (key, ((caption, spoken), clip)) in enumerate(missing.items()):
                report("encoding captions", done, len(missing))
                keep(store, key, encode_text(pipe, caption, spoken, clip))
            if not store.has(nothing):
                keep(store, nothing, pipe.text.unconditional(1))
    return nothing


def encode_text(pipe: Stages, caption: str, spoken: str | None, clip: Clip) -> Conditioning:
    """One row for a caption. Raises ValueError where a speech model is not told what is said."""
    try:
        return pipe.encode(caption, transcription=spoken if pipe.text.is_speech_model else None)
    except ValueError as error:
        raise ValueError(f"{clip.path}: {error}") from error


def keep(store: Store, key: str, row: Conditioning) -> None:
    tensors = {f"context{i}": context for i, context in enumerate(row.contexts)}
    tensors |= {f"mask{i}": mask for i, mask in enumerate(row.masks) if mask is not None}
    tensors |= {} if row.film is None else {"film": row.film}
    store.put(key, {name: tensor.detach().cpu() for name, tensor in tensors.items()})


def key_of(*values: object) -> str:
    return digest(canonical(list(values)))
