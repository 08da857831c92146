"""Writes checkpoints in Meta's and Hugging Face's format from any source of weights."""
