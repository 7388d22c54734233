"""Benchmarks: ours beside its peers, same inputs, same run. `python -m benchmarks --help`."""
