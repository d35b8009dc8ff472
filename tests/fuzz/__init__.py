"""Damaged files, by a seed: each gives the sound of the whole file, or is refused in one line that names it.

    python -m tests.fuzz --cases 2000 --seed 7          # a table of counts, and what fell short
"""
