"""What Hydra composes and launches: configs from a command line, the jobs of a sweep, what becomes of them."""
