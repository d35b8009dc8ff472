"""CLAP as a measuring device: sounds and texts -> unit vectors in one space, from any checkpoint or ClapModel."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from ldm2 import __version__, audio, weights
from ldm2.checkpoints import build, hub, known, reading
from ldm2.checkpoints.hub_folder import weight_files
from ldm2.fields import flat, read_json
from ldm2.text.encoders import ClapText
from ldm2.text.ranking import ClapAudio, Ranker
from ldm2.text.tokenizers import from_pretrained, read_folder

DEFAULT = "laion/clap-htsat-unfused"                       # the CLAP that ranks in the published checkpoints
SHORTEST = 1.0                                             # seconds: what remains after the last whole piece counts
SMALL_FILES = ("*.json", "*.txt")                          # of a ClapModel's repository: configs, tokenizer


class Embedding:
    """Sounds and texts -> unit vectors (D,) in float64.

    name: what it was asked for by; revision: commit on the hub, version of ldm2 for a bundled model, or the digest of
    its weights
    """

    def __init__(self, ranker: Ranker, name: str, revision: str):
        self.ranker, self.name, self.revision = ranker, name, revision

    @property
    def resampler(self) -> str:
        """What brings sounds to CLAP's sample rate: resampling moves distances."""
        return f"soxr {metadata.version('soxr')} VHQ"

    @torch.no_grad()
    def sound(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """A waveform (N,) -> the mean direction of its pieces of the length that CLAP hears (10 s), (D,).

        What remains after the last whole piece counts if it lasts a second or more, or is all there is.
        """
        extractor = self.ranker.audio.extractor
        rate, most = extractor.sampling_rate, extractor.nb_max_samples
        heard = audio.resample(waveform, sample_rate, rate)
        pieces = [heard[start : start + most] for start in range(0, len(heard), most)]
        if len(pieces) > 1 and len(pieces[-1]) < SHORTEST * rate:
            del pieces[-1]
        vectors = torch.cat([self.ranker.audio(piece[None], rate) for piece in pieces])
        mean = vectors.double().cpu().numpy().mean(axis=0)
        return mean / np.linalg.norm(mean)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Texts -> (P, D)."""
        return torch.cat([self.ranker.text([prompt]) for prompt in prompts]).double().cpu().numpy()


def load(
    name: str = DEFAULT, *, device: torch.device | str = "cpu", revision: str | None = None,
    local_files_only: bool = False,
) -> Embedding:
    """The CLAP of a checkpoint, or a ClapModel with its tokenizer and feature extractor, in float32.

    name: of a checkpoint (see `ldm2 models`), of a ClapModel on the hub, or a folder or authors' file. Raises
    ValueError or OSError, one line, for what is not there or holds no CLAP with an audio branch.
    """
    path = _find(name, revision, local_files_only)
    if path.is_file() or (path / "model_index.json").is_file():
        ranker = build.ranker(reading.read(path, local_files_only=local_files_only), device=device)
    else:
        ranker = _clap(path, device)
    model = known.find(name)
    bundled = f"ldm2 {__version__}" if model is not None and model.layout == "bundled" else None
    return Embedding(ranker, name, bundled or hub.commit_of(path) or _digest(_weight_files(path)))


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of CLAP: an authors' file holds all."""
    if path.is_file():
        return [path]
    return weight_files(path / "text_encoder" if (path / "model_index.json").is_file() else path)


def _clap(folder: Path, device: torch.device | str) -> Ranker:
    """From the files of a ClapModel."""
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != "clap":
        raise ValueError(f"{folder} is no ClapModel: its config.json says model_type {fields.get('model_type')!r}")
    tensors, source = weights.read_tensors(folder), str(folder)
    text = ClapText.load(fields, tensors, read_folder("RobertaTokenizer", folder), device=device, dtype=torch.float32,
                         source=source)
    extractor = from_pretrained("ClapFeatureExtractor", folder)
    return Ranker(text, ClapAudio.load(fields, tensors, extractor, device=device, source=source))


def _find(name: str, revision: str | None, local_files_only: bool) -> Path:
    """A folder or file, here or fetched."""
    here = Path(name).expanduser()
    if here.is_dir() and (here / "config.json").is_file():
        return here
    if here.exists() or known.find(name) is not None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return hub.resolve(name, revision=revision, local_files_only=local_files_only)
    folder = _fetch(name, revision, SMALL_FILES, local_files_only)
    if (folder / "model_index.json").is_file():
        return hub.resolve(name, revision=revision, local_files_only=local_files_only)
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        folder = _fetch(name, revision, (*SMALL_FILES, pattern), local_files_only)
        if any(folder.glob(pattern)):
            break
    return folder


def _fetch(name: str, revision: str | None, patterns: Sequence[str], local_files_only: bool) -> Path:
    """The folder of a repository with the files that match, from the cache or the hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns),
                                      local_files_only=local_files_only))
    except (OSError, errors.HTTPError) as error:
        raise OSError(f"{name} is not in the cache and cannot be fetched ({type(error).__name__}: {flat(error, 200)})"
                      ) from None


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return f"sha256 {digest.hexdigest()[:12]}"
