"""The engine: sequences in, tokens out, one flat batch per step, over a paged KV cache."""
