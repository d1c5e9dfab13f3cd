"""A compressed model as one file, and back."""
