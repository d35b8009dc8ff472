"""Editing: a sound in, a sound out."""
