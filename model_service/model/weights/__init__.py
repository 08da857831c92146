"""Weights: from files to the matrices that the network multiplies."""
