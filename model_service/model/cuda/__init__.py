"""The code for CUDA alone: Triton's kernels, and copies between host and device."""

# Raised with every change to the order or rounding of the kernels that are batch-invariant: answers
# of replicas with another number may differ.
ARITHMETIC = 1
