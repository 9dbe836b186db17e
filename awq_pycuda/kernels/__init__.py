"""The kernels as data: what they are compiled from, how they are launched, what they cannot take. Needs no CUDA."""
