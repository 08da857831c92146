"""TLS and API keys: certificates, and the identity of a caller."""
