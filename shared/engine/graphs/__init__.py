"""Steps of decodes as CUDA graphs, and their static input."""
