"""Prints the perplexity of a text file under the served model.

python examples/python/perplexity.py FILE [host:port]

A long text is scored in windows. Each token is scored once, behind at least half a context of the
tokens before it, so the result is that of one long context but for what lies further back.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from chasqui import DEFAULT_TARGET, Client


def windows(
    ids: Sequence[int], context_length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Pairs of token ids: those in front, and those that are scored behind them."""
    begin, end = 1, min(context_length, len(ids))  # nothing predicts the first token
    while begin < len(ids):
        yield ids[max(0, end - context_length) : begin], ids[begin:end]
        begin, end = end, min(end + context_length // 2, len(ids))


def main(file: str, target: str = DEFAULT_TARGET) -> None:
    with Client(target) as client:
        ids = client.tokenize(Path(file).read_text("utf-8")).ids
        logprob = 0.0
        for before, scored in windows(ids, client.get_model().context_length):
            [score] = client.score(before, [scored])
            logprob += score.logprob
    count = len(ids) - 1
    print(f"{count} tokens, mean logprob {logprob / count:.4f}")
    print(f"perplexity {math.exp(-logprob / count):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
