"""Where weights and activations come from: the plan of a run's layers, and files of layers."""
