"""Chasqui beside its peers on the same machine and weights: `python -m bench.baselines`."""
