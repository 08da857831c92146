"""How a dialog becomes a prompt."""
