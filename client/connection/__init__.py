"""How a client reaches a server: targets, channels, and why a connection failed."""
