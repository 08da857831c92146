"""Meta's format of checkpoints: params.json and consolidated.*.pth."""
