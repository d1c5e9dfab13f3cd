"""What `--benchmark` measures, and what can only be known on a GPU: each measurement beside its rows, and tables."""
