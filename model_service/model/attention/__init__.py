"""Attention over the paged KV cache: one interface, one module for each backend."""
