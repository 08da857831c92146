"""The model replicas: which are ready, which one runs a sequence, and failover."""
