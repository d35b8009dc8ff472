"""A pool of clips in memory: waveforms, log-mels and what they are, made once and kept in a file."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm2.mel import log_mel
from ldm2.training.tiny.sounds import Sound, sounds

_CHUNK = 250                               # clips per seed: the pool does not depend on the number of processes


@dataclass(frozen=True)
class Pool:
    """Clips of equal length. waveforms int16 (M, N), mels float16 (M, 1, T, F); the rest has one entry per clip."""

    waveforms: Tensor
    mels: Tensor
    labels: list[str]
    levels: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def waveform(self, rows: Tensor) -> Tensor:
        """Samples of these clips as float32 (len(rows), N)."""
        return self.waveforms[rows].float() / 32767

    def mel(self, rows: Tensor) -> Tensor:
        """Log-mels of these clips as float32 (len(rows), 1, T, F)."""
        return self.mels[rows].float()

    def split(self, held_out: int) -> tuple[Pool, Pool]:
        """All but the last `held_out` clips, and those."""
        cut = len(self) - held_out
        parts = (slice(0, cut), slice(cut, len(self)))
        fields = (self.waveforms, self.mels, self.labels, self.levels, self.captions)
        return tuple(Pool(*(field[part] for field in fields)) for part in parts)


def collect(clips: Iterable[Sound]) -> Pool:
    """The clips as a pool. They must have equal length."""
    clips = list(clips)
    waveforms = torch.from_numpy(np.stack([np.round(clip.waveform * 32767).astype(np.int16) for clip in clips]))
    mels = torch.cat([log_mel(part.float() / 32767).half() for part in waveforms.split(64)])
    return Pool(waveforms, mels, [c.kind for c in clips], [c.level for c in clips], [c.caption for c in clips])


def _chunk(seed: int, index: int) -> Pool:
    torch.set_num_threads(1)
    return collect(sounds(seed * 100_000 + index, _CHUNK))


def formula_pool(seed: int, count: int, path: Path | None = None, processes: int = 1) -> Pool:
    """A pool of `count` sounds (a multiple of 250) made by formulas, read from `path` if that file holds it."""
    if count % _CHUNK or count <= 0:
        raise ValueError(f"count must be a positive multiple of {_CHUNK}, got {count}")
    if path is not None and path.exists():
        fields = torch.load(path, weights_only=True)
        if fields.pop("origin") == [seed, count]:
            return Pool(**fields)
    chunks = range(count // _CHUNK)
    if processes > 1:
        with ProcessPoolExecutor(processes) as executor:
            pools = list(executor.map(_chunk, repeat(seed), chunks))
    else:
        pools = [_chunk(seed, index) for index in chunks]
    fields = {
        "waveforms": torch.cat([p.waveforms for p in pools]),
        "mels": torch.cat([p.mels for p in pools]),
        "labels": [label for p in pools for label in p.labels],
        "levels": [level for p in pools for level in p.levels],
        "captions": [text for p in pools for text in p.captions],
    }
    if path is not None:
        torch.save(fields | {"origin": [seed, count]}, path)
    return Pool(**fields)
