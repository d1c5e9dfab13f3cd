"""A compressed model as a graph of static shapes: files that run without this package."""
