"""Benchmarks: attention against its peers, and checkpoints against plain library calls."""
