"""The demonstration checkpoint, with the program and the text of its training."""
