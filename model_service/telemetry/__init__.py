"""Metrics and spans of a replica."""
