"""Programs that work on the files of a model, and ask the machine, without a running service."""
