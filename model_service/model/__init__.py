"""The Llama 2 network: its shape, its layers, and how checkpoints become weights."""
