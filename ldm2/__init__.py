"""ldm2: a from-scratch PyTorch implementation of AudioLDM 2. Text to sound effects, music and speech.

    import ldm2
    ldm2.generate("a dog barking in the rain").save("dog.wav")

Importing this package imports neither torch nor transformers: the names below are imported when they are first used.
`__init__.pyi` shows them to type checkers and editors.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AudioLDM2": "ldm2.pipeline",
    "Cancelled": "ldm2.samplers",
    "Result": "ldm2.result",
    "Settings": "ldm2.settings",
    "generate": "ldm2.loading",
    "load": "ldm2.loading",
}

__all__ = ["AudioLDM2", "Cancelled", "Result", "Settings", "__version__", "generate", "load"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm2' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
