"""Where the pipeline runs: one protocol, two implementations."""
