"""One compressed block at fixed counts, as functions of a token state."""
