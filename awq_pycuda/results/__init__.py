"""The result file: its schema, what a run leaves, writing and reading it; knows nothing of how a run is made."""
