"""The engine of one replica: schedules sequences, runs steps, samples tokens."""

# How often an idle replica sends a token through all of its shards. Here, because the settings
# refer to it, and reading them must not import PyTorch.
PROBE_INTERVAL = 5.0  # seconds
