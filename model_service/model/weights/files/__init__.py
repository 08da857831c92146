"""Readers and writers of files with weights: each format that a checkpoint may have."""
