"""Benchmarks; README.md says how to run and read them, RESULTS.md what was measured."""
