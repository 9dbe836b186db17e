"""Quantized layers as the checkpoints that other tools load."""
