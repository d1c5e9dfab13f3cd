"""What `--benchmark` measures: each measurement beside its rows, and tables of rows."""
