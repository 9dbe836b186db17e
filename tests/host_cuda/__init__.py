"""Kernels on the CPU: compiled from their own text with g++, launched by the CUDA backend, watched as they run."""
