"""Which drafts a step computes: from which source, and how many for each sequence."""
