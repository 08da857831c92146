"""How often an idle replica sends a token through all of its shards.

Apart from the engine, as the settings refer to it: reading them must not import PyTorch.
"""

PROBE_INTERVAL = 5.0  # seconds
