"""How the bundled model `tiny` was made: `python -m ldm2.training.tiny`."""
