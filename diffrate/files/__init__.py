"""A compressed model in files: saved and loaded, exported to other runtimes."""
