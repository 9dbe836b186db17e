"""Quantized layers as checkpoints in the layouts of other tools."""
