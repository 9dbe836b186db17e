"""Quantization itself, on host arrays: formats, the search for scales, figures of merit."""
