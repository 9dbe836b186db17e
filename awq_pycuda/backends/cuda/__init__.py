"""All that touches CUDA; only `toolchain` and `early` can be imported where there is no driver."""
