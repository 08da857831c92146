"""One step: what it runs, on all shards."""
