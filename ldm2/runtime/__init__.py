"""How a model runs: memory, CUDA graphs, compilation, the layout of weights, and DeepCache."""
