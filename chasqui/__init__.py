"""Chasqui, as its users import it."""
