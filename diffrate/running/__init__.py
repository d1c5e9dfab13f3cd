"""A finished model at work: scored, timed, compiled."""
