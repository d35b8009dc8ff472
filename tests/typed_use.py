"""How people call ldm2, for mypy: what it must refuse is marked, and a mark without a refusal is an error too."""

from __future__ import annotations

from typing import assert_type

import ldm2


def use(pipe: ldm2.AudioLDM2) -> None:
    """Never called."""
    assert_type(ldm2.load("tiny"), ldm2.AudioLDM2)
    assert_type(ldm2.generate("a siren", model="tiny"), ldm2.Result)
    assert_type(pipe.generate("a siren", steps=3, seed=0, preset="fast"), ldm2.Result)
    assert_type(pipe.inpaint("bell.wav", times=[(0.5, None)], keep_format=True), ldm2.Result)
    pipe.generate("a siren", stepz=3)  # type: ignore[call-arg]
    pipe.generate("a siren", steps="many")  # type: ignore[arg-type]
    pipe.transfer("bell.wav", "a siren", strength="loud")  # type: ignore[arg-type]
    ldm2.generate("a siren", model="tiny", stepz=3)  # type: ignore[call-arg]
    ldm2.load("tiny", devise="cpu")  # type: ignore[call-arg]
