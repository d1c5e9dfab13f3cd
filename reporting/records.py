"""The names of the files that a run leaves in its output folder."""

LOG = "log.txt"  # a JSON line for each epoch, score and timing
STEPS = "search_steps.txt"  # how the expected counts of a search moved, a JSON line every few steps
FOUND = "found.txt"  # what searches ended with, JSON lines
WORK = "search_work.txt"  # what searches had spent and come to, stage by stage, JSON lines
SENSITIVITY = "sensitivity.txt"  # what each block loses alone, JSON lines
SPEED, SCALING, LATENCY = "benchmark.json", "benchmark_scaling.json", "benchmark_latency.json"
RATES = "compression_rate.json"
