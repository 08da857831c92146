"""The engine's benchmark in the sizes of a GPU."""
