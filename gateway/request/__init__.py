"""Requests: validation, and prompts in tokens."""
