"""The differentiable choice of a count, and one block in search."""
