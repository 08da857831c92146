"""Which sequences a step runs, and how many tokens of each."""
