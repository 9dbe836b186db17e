"""Offline analysis: reads result files only. Nothing here needs CUDA, Hydra or the configs of the runs."""
