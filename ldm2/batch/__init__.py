"""Many rows of prompts and options -> many sound files and a manifest: resumable, in shards, by several processes."""

from ldm2.batch.cluster import on_ray

__all__ = ["on_ray"]
