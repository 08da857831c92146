"""What is asked: validation, and prompts in tokens."""
