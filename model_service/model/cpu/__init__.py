"""The CPU: the instructions that its kernels use."""
