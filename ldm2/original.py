"""The authors' own checkpoint files, part by part: see `ldm2.checkpoints.original`."""

from ldm2.checkpoints.original import Components, components, ranker

__all__ = ["Components", "components", "ranker"]
