"""LoRAs in the weights of a pipeline: added when they are asked for, taken out again without a trace.

They are merged, so that kernels, graphs and compiled steps see nothing but weights. The weights that a LoRA changes are
kept as they were: what is taken out leaves the very same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm2.checkpoints.adapter import PARTS, Adapter, combined
from ldm2.checkpoints.lora_files import NAMES, File, find
from ldm2.layers import weight_of
from ldm2.ops import dense
from ldm2.options import check_number, check_text
from ldm2.runtime.inference import ordinary

if TYPE_CHECKING:
    from ldm2.text.encoder import TextEncoder
    from ldm2.unet import UNet

_STAGES = {"unet": "unet", "language_model": "text", "projection_model": "text"}
KEPT = 8                                                   # adapters that have been read

Original = tuple[Tensor, Tensor | None]                    # of a layer: its weight, and the scale if that is int8
Asked = Sequence[Any]                                      # (file or name, scale), maybe with a SHA-256, of settings


@dataclass(frozen=True)
class Entry:
    """A LoRA with its scale: `word` is what it was asked for by, `digest` of its file."""

    word: str
    scale: float
    digest: str
    adapter: Adapter


class Adapters:
    """The LoRAs of one pipeline.

    unet, text: where they are merged. low_memory: whether these are in memory in their stages only, see `woken`
    files:      names that stand for files, such as those that a checkpoint brings in its folder lora/
    standing:   what `load_lora` has loaded, by name: it holds for every request that asks for nothing itself
    """

    def __init__(self, unet: UNet, text: TextEncoder, low_memory: bool, files: Mapping[str, Path] | None = None):
        self.unet, self.text, self.low_memory = unet, text, low_memory
        self.files = dict(files or {})
        self.standing: dict[str, Entry] = {}
        self._merged: tuple[Entry, ...] = ()               # what the weights hold now
        self._originals: dict[str, dict[str, Original]] = {}
        self._read: dict[tuple, tuple[str, Adapter]] = {}
        self._free, self._users = threading.Condition(), 0
        self._mine = threading.local()

    def __getstate__(self) -> dict:
        """A copy has a lock of its own, and nobody who uses it."""
        return {name: value for name, value in vars(self).items() if name not in ("_free", "_users", "_mine")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _free=threading.Condition(), _users=0, _mine=threading.local())

    # What is asked for

    def entry(self, word: str, scale: float, expected: str | None = None) -> Entry:
        """A LoRA, read and held against the model. Raises ValueError or OSError, one line.

        expected: the digest that its file must have.
        """
        digest, adapter = self._opened(find(word, self.files))
        if expected is not None and digest != expected:
            raise ValueError(f"the LoRA {word} has changed: its SHA-256 was {expected:.12}..., is {digest:.12}...; to "
                             f"use it as it is, ask for it without a digest, as {word}:{scale:g}")
        return Entry(word, scale, digest, adapter)

    def _opened(self, file: File) -> tuple[str, Adapter]:
        """Digest and content of a file, which is read again when it has changed. It must fit the model."""
        paths = [path for path in (file.tensors, file.config) if path is not None]
        facts = [(str(path.absolute()), os.stat(path)) for path in paths]
        stamp = tuple((path, fact.st_size, fact.st_mtime_ns, fact.st_ino) for path, fact in facts)
        with self._free:
            if stamp not in self._read:
                digest, adapter = file.digest(), file.read()
                for part in adapter.parts:
                    adapter.fitted(part, self._weights(part, adapter))
                while len(self._read) >= KEPT:
                    self._read.pop(next(iter(self._read)))
                self._read[stamp] = digest, adapter
            return self._read[stamp]

    def entries(self, asked: Asked | None) -> tuple[Entry, ...]:
        """What a request means; None: what stands."""
        return tuple(self.standing.values()) if asked is None else tuple(self.entry(*each) for each in asked)

    def pinned(self, asked: Asked | None) -> Asked | None:
        """What a request means with the digests of the files, for the settings of what is made."""
        if asked is None and not self.standing:
            return None
        return tuple((each.word, each.scale, each.digest) for each in self.entries(asked))

    def load(self, path: str | os.PathLike[str], scale: float, name: str | None) -> str:
        """See `Loaded.load_lora`."""
        word = check_text("path", str(path) if isinstance(path, os.PathLike) else path)
        name = name_of(word) if name is None else check_text("name", name)
        if name in self.standing:
            raise ValueError(f"a LoRA named {name!r} is loaded: unload it first, or give this one another name")
        entry = self.entry(word, check_number("scale", scale))
        self._stand({**self.standing, name: entry})
        return name

    def unload(self, name: str | None) -> None:
        """See `Loaded.unload_lora`."""
        kept = {} if name is None else {other: entry for other, entry in self.standing.items() if other != name}
        self._known(name)
        self._stand(kept)

    def rescale(self, scales: Mapping[str, float]) -> None:
        """See `Loaded.set_lora_scale`; several at once."""
        changed = dict(self.standing)
        for name, scale in scales.items():
            self._known(name)
            changed[name] = replace(changed[name], scale=check_number("scale", scale))
        self._stand(changed)

    def recipe(self) -> dict[str, Any]:
        """What `follow` needs in another process: files, and what stands of them."""
        files = {name: str(path) for name, path in self.files.items()}
        standing = [(str(Path(entry.adapter.source).absolute()), entry.scale, name)
                    for name, entry in self.standing.items()]
        return {"files": files, "standing": standing}

    def follow(self, recipe: Mapping[str, Any]) -> None:
        """Be as the adapters are that a recipe is of."""
        self.files = {name: Path(path) for name, path in recipe["files"].items()}
        for path, scale, name in recipe["standing"]:
            self.load(path, scale, name)

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self.standing:
            loaded = ", ".join(self.standing) or "none"
            raise ValueError(f"no LoRA named {name!r} is loaded, but {loaded}")

    def _stand(self, standing: dict[str, Entry]) -> None:
        """Let other LoRAs stand, and merge them. Raises ValueError inside a request, and leaves all as it was then."""
        self._refuse_inside()
        before, self.standing = self.standing, standing
        try:
            with self.hold():
                pass
        except BaseException:
            self.standing = before
            raise

    # What the weights hold

    @contextmanager
    def hold(self, asked: Asked | None = None) -> Iterator[None]:
        """The weights hold what a request means, and nothing else, inside. Other requests for the same may run beside;
        those for something else wait. Inside a request of the same thread nothing changes.

        Raises ValueError for a request for something else inside of one.
        """
        if getattr(self._mine, "held", False):
            if asked is not None and _key(self.entries(asked)) != _key(self._merged):
                self._refuse_inside()
            yield
            return
        with self._free:
            while _key(wanted := self.entries(asked)) != _key(self._merged) and self._users:
                self._free.wait()
            if _key(wanted) != _key(self._merged):
                self._merge(wanted)
            self._users += 1
        self._mine.held = True
        try:
            yield
        finally:
            self._mine.held = False
            with self._free:
                self._users -= 1
                self._free.notify_all()

    def hold_in(self, stage: str) -> AbstractContextManager:
        """`hold` what stands during a stage, where its parts can have LoRAs."""
        return self.hold() if stage in _STAGES.values() else nullcontext()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The weights are the model's own inside, where they may be moved or replaced; what stands is merged anew."""
        self._refuse_inside()
        with self._free:
            self._free.wait_for(lambda: not self._users)
            self._merge(())
            try:
                yield
            finally:
                self._merge(tuple(self.standing.values()))

    def _refuse_inside(self) -> None:
        if getattr(self._mine, "held", False):
            raise ValueError("LoRAs cannot be changed inside a request that is running")

    def woken(self, stage: str) -> None:
        """The parts of a stage have been read from their files (low_memory): merge what holds into them."""
        for part in PARTS:
            if _STAGES[part] == stage:
                self._originals.pop(part, None)
                self._add(part)

    def _merge(self, wanted: tuple[Entry, ...]) -> None:
        if self.low_memory and not all(_asleep(self._part(part)) for part in PARTS):
            raise ValueError("with low_memory LoRAs are changed outside of the stages of the pipeline")
        self._restore()
        self._merged = wanted
        try:
            for part in PARTS:
                self._add(part)
        except BaseException:                              # out of memory, for one
            self._restore()
            raise

    def _restore(self) -> None:
        """Take out what is merged."""
        with ordinary():
            for part, originals in self._originals.items():
                weights = Weights(self._part(part))
                for name, original in originals.items():
                    weights.put_back(name, original)
        self._originals.clear()
        self._merged = ()

    def _add(self, part: str) -> None:
        """Merge what holds into a part that is as its files are, unless it is asleep."""
        module = self._part(part)
        adapters = [(each.adapter, each.scale) for each in self._merged]
        if _asleep(module) or not any(part in adapter.parts for adapter, _ in adapters):
            return
        with ordinary():
            weights = Weights(module)
            changed = combined(weights, part, adapters)
            if not self.low_memory:
                self._originals[part] = {name: weights.kept(name) for name in changed}
            for name, weight in changed.items():
                weights.put(name, weight)

    def _part(self, part: str) -> Any:
        return {"unet": self.unet, "language_model": self.text.gpt2, "projection_model": self.text.projection}[part]

    def _weights(self, part: str, adapter: Adapter) -> Mapping[str, Tensor]:
        """The weights of a part. Raises ValueError if the model has no such part."""
        module = self._part(part)
        if module is None:
            raise ValueError(f"{adapter.source} is a LoRA of another model: this one has no {part}")
        return Weights(module)


class Weights(Mapping[str, Tensor]):
    """The weights of the layers of a module by their names, to be read and changed. Int8 ones are read in float32, and
    are float32 for as long as they are changed: a change of less than half a step would be lost."""

    def __init__(self, module: nn.Module):
        self._layers: dict[str, Any] = {
            f"{name}.weight": layer for name, layer in module.named_modules()
            if isinstance(getattr(layer, "weight", None), nn.Parameter)
        }

    def __getitem__(self, name: str) -> Tensor:
        return dense(weight_of(self._layers[name]), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def kept(self, name: str) -> Original:
        """A weight as it is, for `put_back`."""
        layer = self._layers[name]
        scale = getattr(layer, "weight_scale", None)
        if scale is not None:
            return layer.weight, scale
        return layer.weight.data if _replaced(layer.weight) else layer.weight.data.clone(), None

    def put(self, name: str, value: Tensor) -> None:
        """Change a weight."""
        layer = self._layers[name]
        if getattr(layer, "weight_scale", None) is not None:
            layer.weight, layer.weight_scale = nn.Parameter(value, requires_grad=False), None
        elif _replaced(layer.weight):
            layer.weight.data = value
        else:
            layer.weight.data.copy_(value)

    def put_back(self, name: str, original: Original) -> None:
        """Make a weight what it was, bit by bit."""
        value, scale = original
        if scale is None:
            self.put(name, value)
        else:
            layer = self._layers[name]
            layer.weight, layer.weight_scale = value, scale


def name_of(path: str) -> str:
    """What a LoRA is called by default: its file, or the folder of one that has the name that all have."""
    path = os.path.abspath(os.path.expanduser(path))
    usual = os.path.basename(path) in NAMES
    return Path(os.path.dirname(path) if usual else path).stem


def _key(entries: Sequence[Entry]) -> tuple:
    """Which LoRAs, at which scale."""
    return tuple((each.digest, each.scale) for each in entries)


def _asleep(module: nn.Module | None) -> bool:
    """Whether the weights of a part are not in memory, or there is none."""
    return module is None or next(module.parameters()).is_meta


def _replaced(parameter: nn.Parameter) -> bool:
    """Whether another tensor takes the place of a weight that changes. On a CPU its memory may be that of a file;
    elsewhere CUDA graphs and joined matrices rely on where it lies."""
    return parameter.device.type == "cpu"
