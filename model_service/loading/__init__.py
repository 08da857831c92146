"""From options to a replica that is ready: precision, memory, shards, warm-up."""
