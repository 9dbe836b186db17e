"""Experiment harness for Activation-aware Weight Quantization (AWQ) on GPUs and CPUs."""

__version__ = "0.1.0"
