"""Training of the parts of ldm2: data, losses and loops in small modules; `ldm2.training.tiny` runs all of them."""
