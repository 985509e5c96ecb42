"""Training's kernels, each judged, repeated, weighed and timed: `python -m dsa_bench.training --help`."""
