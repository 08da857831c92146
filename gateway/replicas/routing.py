"""Chooses the replica for a sequence. A replica computes only the part of a prompt that is not in
its prefix cache, so a prompt goes to the replica that has its longest beginning; unless that one
has no room, because a sequence that waits loses more than it saves.
"""

from collections.abc import Sequence

from gateway.replicas.replica import ReplicaClient


def choose(
    ready: Sequence[ReplicaClient], digests: Sequence[bytes], tokens: int
) -> ReplicaClient | None:
    """The best of `ready` for a prompt of `tokens` tokens whose blocks have these digests.

    The longest known beginning among those with room decides, else the least outstanding tokens.
    A replica that is late with its load report is chosen only if all are.
    """
    candidates = [replica for replica in ready if not replica.load.overdue] or ready
    if not candidates:
        return None
    # Read once: each is a sum over all sequences of a replica.
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
    info, load = replica.info, replica.load.latest
    if info is None or replica.sequences >= info.max_batch_size:
        return False
    # Half of the work that it can hold: about as much as a full batch slows down one sequence.
    imbalance = info.max_batch_size * info.context_length // 2
    if excess > imbalance:
        return False
    return load is None or (
        load.waiting_sequences == 0 and load.free_blocks * load.block_size >= tokens
    )
