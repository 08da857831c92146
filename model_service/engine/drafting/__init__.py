"""Sources of drafts: the text itself, and a small model."""
