"""The connection of a client to a server: targets, channels, and why a connection failed."""
