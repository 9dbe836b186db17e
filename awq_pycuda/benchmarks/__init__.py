"""Kernels and whole passes against the limits of the machine that they run on, and against what others do the same."""
