"""The demonstration checkpoint, and the program and text that it was trained from."""
