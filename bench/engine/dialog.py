"""What the prefix cache saves: time to first token over the turns of one dialog."""

from collections.abc import Iterator

from bench.engine.session import Variant, session
from bench.report import Row


def turns(variant: Variant, count: int, user: int, answer: int) -> Iterator[Row]:
    """A dialog whose every turn adds `user` tokens and is answered with `answer` tokens."""
    for prefix_cache in (True, False):
        yield from _dialog(variant, count, user, answer, prefix_cache=prefix_cache)


def _dialog(
    variant: Variant, count: int, user: int, answer: int, *, prefix_cache: bool
) -> Iterator[Row]:
    settings = {"prefix_cache": prefix_cache}
    with session(variant.options(1, count * (user + answer) + 1, settings=settings)) as run:
        # Long enough to touch what a first turn would otherwise pay for.
        run.until_first_token(run.add(run.prompt(user), 1))
        history: tuple[int, ...] = ()
        for turn in range(1, count + 1):
            history += run.prompt(user)
            cached = run.engine.load().cached_prompt_tokens
            request = run.add(history, answer)
            seconds = run.until_first_token(request)
            made = 1
            while made < answer:
                made += run.step().tokens.get(request, 0)
            history += run.answers[request]
            yield Row(
                "dialog",
                {"precision": variant.precision, "prefix_cache": prefix_cache, "turn": turn},
                {
                    "prompt_tokens": len(history) - answer,
                    "first_token_ms": seconds * 1e3,
                    "cached_prompt_tokens": run.engine.load().cached_prompt_tokens - cached,
                },
            )
