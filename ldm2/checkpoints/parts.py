"""The one form of a checkpoint, whatever holds it: parts, each with the fields of its config.json and named tensors.

    checkpoint = reading.read("audioldm2-full.pth")        # or a folder in the hub's layout
    checkpoint["unet"].fields["block_out_channels"], checkpoint["unet"].tensors["conv_in.weight"]

`build` makes modules of it, `convert` writes it as a folder, `describe` counts what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint as a folder in the hub's layout holds it.

    source, config: what errors call the part, and its fields
    read_fields:    () -> the fields of its config.json
    read_tensors:   (to_copy) -> its tensors, memory-mapped; see `weights.read_tensors`
    kind:           its class in the words of model_index.json, "" where the checkpoint does not say
    folder:         where it lies, None for a part of a file
    """

    source: str
    config: str
    read_fields: Callable[[], dict[str, Any]]
    read_tensors: Callable[[bool], Tensors]
    kind: str = ""
    folder: Path | None = None

    @classmethod
    def of(cls, source: str, fields: dict[str, Any], tensors: Tensors) -> Part:
        """A part whose fields and tensors are known."""
        return cls(source, source, lambda: fields, lambda to_copy: tensors)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its config.json, read now. Raises ValueError naming the file."""
        return self.read_fields()

    @property
    def tensors(self) -> Tensors:
        """Its tensors, mapped now. Raises ValueError naming the file."""
        return self.read_tensors(False)

    def tensors_for(self, dtype: torch.dtype | None) -> Tensors:
        """Its tensors for a module in `dtype` (None is that of the file): what will be cast does not stay in memory."""
        return self.read_tensors(dtype not in (None, torch.float32))


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Part]):
    """The parts of a checkpoint by their names in a folder in the hub's layout.

    source:    what errors call it
    tokenizer: the tokenizer of an encoder ("clap", "t5" or "phonemes")
    extractor: what makes the spectrograms of CLAP's audio branch; None for a checkpoint without
    defaults:  what it asks for in its ldm2.json, such as its length and number of steps
    loras:     files of LoRAs that it brings, by their names
    """

    source: str
    parts: Mapping[str, Part]
    tokenizer: Callable[[str], Any]
    extractor: Callable[[], Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, Path] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def can_rank(self) -> bool:
        """Whether it brings CLAP's audio branch and what that needs."""
        part = self.get("text_encoder")
        return part is not None and self.extractor is not None and "audio_config" in part.fields

    def require(self, name: str) -> Part:
        """The part of this name. Raises ValueError if there is none."""
        if name not in self.parts:
            raise ValueError(f"{self.source} holds no {name}: generating needs all parts of a model")
        return self.parts[name]
