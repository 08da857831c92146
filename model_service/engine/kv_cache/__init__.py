"""The blocks of the KV cache, and what they hold."""
