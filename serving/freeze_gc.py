"""Python's cyclic garbage collector in a server. By itself it makes a full collection only when
what became old since the last one is a quarter of all that is old. A server loads so much that this
takes tens of thousands of objects: garbage that outlived the young generations stays for many
minutes, and a full collection walks all that never goes.
"""

import gc


def keep_what_is_loaded() -> None:
    """Takes all that lives now out of collections to come: full ones are then cheap and regular."""
    gc.collect()
    gc.freeze()
    gc.collect()  # a full collection counts what is old: from here on, next to nothing
