"""A whole network on one rank of a replica whose own network is in shards."""

from collections.abc import Iterator
from contextlib import contextmanager

from fairscale.nn.model_parallel import initialize


@contextmanager
def unsharded() -> Iterator[None]:
    """Within it, layers are made and computed as if this rank were the only one.

    fairscale's layers, and the network's sums, ask for one group of the process. Its group for data
    parallelism has this rank alone, because all ranks divide the model.
    """
    group = initialize._MODEL_PARALLEL_GROUP  # noqa: SLF001  # fairscale has no other way
    initialize._MODEL_PARALLEL_GROUP = initialize.get_data_parallel_group()  # noqa: SLF001
    try:
        yield
    finally:
        initialize._MODEL_PARALLEL_GROUP = group  # noqa: SLF001
