"""Benchmarks: workloads, a client, the figures and how they are shown."""
