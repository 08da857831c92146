"""A model and its needs, and what the machine has."""
