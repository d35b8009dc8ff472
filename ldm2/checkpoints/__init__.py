"""Checkpoints: where they come from, what they hold, and how they are read, described and written."""
