"""The names of the files that a run leaves in its output folder."""

LOG = "log.txt"  # a JSON line for each epoch, score and timing
STEPS = "search_steps.txt"  # how the expected counts of a search moved, a JSON line every few steps
FOUND = "found.txt"  # what searches ended with, JSON lines
SPEED, SCALING = "benchmark.json", "benchmark_scaling.json"
RATES = "compression_rate.json"
