"""Chasqui beside other engines on the same machine and weights: `python -m bench.baselines`."""
