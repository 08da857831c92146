"""Sampling on the device, with the same results as on the host."""
