"""Steps recorded as CUDA graphs: those of single tokens as a whole, others up to 512 in pieces."""
