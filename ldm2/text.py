"""Prompts -> Conditioning: the text side of the model."""
from __future__ import annotations

from ldm2.conditioning import Conditioning

__all__ = ["Conditioning"]
