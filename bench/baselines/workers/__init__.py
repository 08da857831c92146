"""One module per engine, each run in its own environment; see `bench.baselines.protocol`."""
