"""Who calls: TLS and API keys."""
