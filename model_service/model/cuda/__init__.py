"""What runs on CUDA alone: Triton's kernels, and copies between host and device."""
