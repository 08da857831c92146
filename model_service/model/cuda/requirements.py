"""Requirements of the kernels that are batch-invariant on CUDA. Imports no Triton."""

import importlib.util
from collections.abc import Mapping

from serving.errors import StartError

_MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 and asynchronous copies
_INPUTS = 32  # the least tile over the inputs of a matrix


def require_kernels(capability: tuple[int, int]) -> None:
    """Raises StartError if they cannot run on a GPU of this compute capability, or not here."""
    if capability < _MIN_CAPABILITY:
        raise StartError(
            "--batch_invariant needs a GPU of compute capability 8.0 or newer, this one has "
            f"{capability[0]}.{capability[1]}: leave the flag out"
        )
    if importlib.util.find_spec("triton") is None:
        raise StartError(
            "--batch_invariant needs Triton, which compiles its kernels and comes with PyTorch's "
            "CUDA builds: pip install triton, or leave the flag out"
        )


def require_whole_tiles(inputs: Mapping[str, int]) -> None:
    """Raises StartError if a shard's matrices, by the name of their inputs, are no whole tiles."""
    uneven = [f"{name} {length}" for name, length in inputs.items() if length % _INPUTS]
    if uneven:
        raise StartError(
            f"--batch_invariant: the kernels' tiles of {_INPUTS} inputs do not divide "
            f"{', '.join(uneven)} of a shard: use fewer shards, or leave the flag out"
        )
