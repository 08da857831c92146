"""How a service's process uses its memory: Python's garbage collector and glibc's allocator."""

import ctypes
import gc

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 128 * 1024
_MOST_KEPT = 1024 * 1024


def return_freed_memory() -> None:
    """Lets freed messages go back to the system at once.

    By default glibc raises its threshold for this with the first large block that is freed, up to
    32 MiB, and a process that once held many large messages keeps their memory. Not for the model
    service: PyTorch's tensors would be paged in anew with each step. Does nothing with other C
    libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def freeze_gc() -> None:
    """Takes all that lives now out of collections to come: full ones are then cheap and regular."""
    gc.collect()
    gc.freeze()
    gc.collect()  # a full collection counts what is old: from here on, next to nothing
