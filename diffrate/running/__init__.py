"""A finished model at work: scored, timed, compiled."""

ROUNDS = 10  # timed pairs of a benchmark
