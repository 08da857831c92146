"""Whether a dialog and its answer may be shown."""
