"""What the prefix cache saves: time to first token over the turns of one dialog."""

from collections.abc import Iterator

from bench.engine.session import Setting, Variant, has_setting, session
from bench.report import Row


def turns(variant: Variant, count: int, user: int, answer: int) -> Iterator[Row]:
    """A dialog whose every turn adds `user` tokens and is answered with `answer` tokens."""
    variants: list[dict[str, Setting]] = [{}]
    if has_setting("prefix_cache"):
        variants = [{"prefix_cache": True}, {"prefix_cache": False}]
    for settings in variants:
        # Without the setting, what this build does is what it does: the counters tell.
        cache = str(settings.get("prefix_cache", "as built"))
        yield from _dialog(variant, settings, cache=cache, count=count, user=user, answer=answer)


def _dialog(
    variant: Variant,
    settings: dict[str, Setting],
    *,
    cache: str,
    count: int,
    user: int,
    answer: int,
) -> Iterator[Row]:
    with session(variant.options(1, count * (user + answer) + 1, settings=settings)) as run:
        # Long enough to touch what a first turn would otherwise pay for.
        run.until_first_token(run.add(run.prompt(user), 1))
        history: tuple[int, ...] = ()
        for turn in range(1, count + 1):
            history += run.prompt(user)
            before = run.counters()
            request = run.add(history, answer)
            seconds = run.until_first_token(request)
            made = 1
            while made < answer:
                made += run.step().tokens.get(request, 0)
            history += run.answers[request]
            after = run.counters()
            yield Row(
                "dialog",
                {"precision": variant.precision, "prefix_cache": cache, "turn": turn},
                {
                    "prompt_tokens": len(history) - answer,
                    "first_token_ms": seconds * 1e3,
                    "cached_prompt_tokens": _grown("cached_prompt_tokens", before, after),
                },
            )


def _grown(name: str, before: dict[str, int], after: dict[str, int]) -> int | None:
    return after[name] - before[name] if name in after else None
