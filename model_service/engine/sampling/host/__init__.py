"""Sampling on the host: draws, penalties, truncation and logprobs."""
