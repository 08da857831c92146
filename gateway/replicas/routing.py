"""Which replica a sequence goes to. A prompt that begins like one that a replica has seen is
computed only from there on, so it goes where the most of it is known; unless that replica has no
room, as a sequence that waits loses more than it saves.
"""

from collections.abc import Sequence

from gateway.replicas.replica import ReplicaClient


def choose(
    ready: Sequence[ReplicaClient], digests: Sequence[bytes], tokens: int
) -> ReplicaClient | None:
    """The one of `ready` for a prompt of `tokens` tokens whose blocks have these digests.

    The longest known beginning among those with room decides, else the least outstanding tokens.
    A replica that is late with its load report is chosen only if all are.
    """
    candidates = [replica for replica in ready if not replica.overdue] or ready
    if not candidates:
        return None
    # Read once: each is a sum over all that runs there.
    outstanding = {replica: replica.outstanding_tokens for replica in candidates}
    least = min(candidates, key=outstanding.__getitem__)
    best, most = least, 0
    for replica in candidates:
        known = replica.prefixes.known_blocks(digests)
        nearer = known > most or (known == most > 0 and outstanding[replica] < outstanding[best])
        excess = outstanding[replica] - outstanding[least]
        if nearer and _has_room(replica, excess, tokens):
            best, most = replica, known
    return best


def _has_room(replica: ReplicaClient, excess: int, tokens: int) -> bool:
    """Whether a sequence would run at once, on a replica not much busier than the idlest.

    `excess` is how many more outstanding tokens it has than that one.
    """
    info, load = replica.info, replica.load
    if info is None or replica.sequences >= info.max_batch_size:
        return False
    # Half of the work that it can hold: as much as the other sequences of a batch slow one down.
    imbalance = info.max_batch_size * info.context_length // 2
    if excess > imbalance:
        return False
    return load is None or (
        load.waiting_sequences == 0 and load.free_blocks * load.block_size >= tokens
    )
