"""Writes a model in another format, file by file."""
