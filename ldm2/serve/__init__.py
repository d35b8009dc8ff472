"""A server: requests over HTTP wait in a queue for one worker, which owns the model."""
