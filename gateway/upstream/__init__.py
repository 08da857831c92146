"""Sessions with the services behind the gateway."""
