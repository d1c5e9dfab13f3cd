"""What `--benchmark` measures, as rows of figures, and the script for what can only be known on a GPU."""
