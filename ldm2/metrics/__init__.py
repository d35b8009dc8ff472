"""Numbers that judge sounds: embeddings of CLAP, their distances, and how well a sound fits a text."""
