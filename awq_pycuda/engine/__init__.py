"""One run over a backend: its stages, its arrays, and what is made of the last pass."""
