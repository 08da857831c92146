"""Benchmarks of the engine and comparisons with its peers; README.md says how to read them."""
