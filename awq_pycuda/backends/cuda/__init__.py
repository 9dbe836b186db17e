"""All that touches CUDA; only `toolchain` can be imported where there is no driver."""
