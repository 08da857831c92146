"""The effect of speculation and quantization on real text, the demonstration checkpoint's.

`speculation`: dialogs whose last turn asks an earlier question again, so that the answer repeats,
and single questions at temperature 1, which repeat nothing. Each is answered with and without
drafts in turn, and the tokens must be equal. Rates are of the steps without prompt tokens.

`quantization`: perplexity of the first written answer to every topic, and of the end of sequence
behind it, given the question; and how many held-out questions are answered sensibly.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench.engine.driver import GREEDY, Driver, Prompt, Trial
from bench.report import Recorder, Row, Value, command_parser, finish, spread
from demo.checkpoint import CHECKPOINT, TOKENIZER
from demo.evaluate import Answer, is_sensible, prompt_of, topic_prompts
from demo.text import expand, read_corpus, read_questions
from demo.tokenizer import Tokenizer
from model_service.engine.sequence import SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import DTYPES

CONTEXT_LENGTH = 512
REPEATED_LENGTH = 64  # tokens of an answer at most, in the case speculation
ANSWER_LENGTH = 256  # tokens at most, in the case quantization
DRAFT_TOKENS = ReplicaOptions(CHECKPOINT).draft_tokens
FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("demonstration", __doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=[*CASES])
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of the weights")
    add("--rounds", type=int, default=7, help="of the case speculation")
    add("--dialogs", type=int, default=16, help="answered per round")
    add("--streams", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args(arguments)
    recorder = Recorder("demonstration", args.results)
    tokenizer = Tokenizer.load(CHECKPOINT / TOKENIZER)
    for case in args.cases:
        recorder.attempt(case, partial(CASES[case], tokenizer, args))
    finish(recorder)


def speculation(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Text that repeats and text that does not, for each number of streams."""
    whole = SamplingParams(temperature=1.0, top_p=1.0)
    texts = {
        "repeats": (_repeating(tokenizer, args.dialogs), GREEDY),
        "new": (topic_prompts(tokenizer, read_corpus().topics)[: args.dialogs], whole),
    }
    for streams in args.streams:
        for text, (prompts, sampling) in texts.items():
            found = _with_and_without_drafts(
                [(tuple(prompt), REPEATED_LENGTH, sampling, [tokenizer.eos]) for prompt in prompts],
                streams,
                args.rounds,
            )
            yield Row("speculation", {"text": text, "streams": streams}, found)


def _repeating(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Dialogs that ask a topic, another one, and the first one again."""
    topics = [topic for topic in read_corpus().topics if len(topic.answer[0]) > 80]
    asked = [(expand(topic.ask[0])[0], topic.answer[0]) for topic in topics]
    return [
        tokenizer.prompt([*asked[i], *asked[-1 - i], asked[i][0]])
        for i in range(min(count, len(asked)))
    ]


def _with_and_without_drafts(
    requests: Sequence[tuple[Prompt, int, SamplingParams, Sequence[int]]],
    streams: int,
    rounds: int,
) -> dict[str, Value]:
    """The columns of one row; `requests` are arguments of `Driver.add`."""
    drivers = {drafts: _driver(streams, draft_tokens=drafts) for drafts in (0, DRAFT_TOKENS)}
    rates: dict[int, list[float]] = {drafts: [] for drafts in drivers}
    for number in range(rounds + 1):  # the first is not counted
        answers = []
        for drafts in sorted(drivers, reverse=number % 2 == 0):
            driver = drivers[drafts]
            numbers = [driver.add(*request) for request in requests]
            trial = driver.finish()
            answers.append([driver.answers[each] for each in numbers])
            if number:
                rates[drafts].append(_rate_without_prompts(trial))
        if answers[0] != answers[1]:
            raise RuntimeError("drafts changed an answer")
    without, drafted = rates[0], rates[DRAFT_TOKENS]
    load = drivers[DRAFT_TOKENS].engine.load()
    return {
        "without_tokens_per_s": statistics.median(without),
        "with_tokens_per_s": statistics.median(drafted),
        **spread("ratio", [b / a for a, b in zip(without, drafted, strict=True)]),
        "drafted": load.drafted_tokens,
        "accepted": load.accepted_tokens,
    }


def _rate_without_prompts(trial: Trial) -> float:
    """Tokens per second of the steps without prompt tokens."""
    steps = [
        (sum(step.tokens.values()), seconds)
        for step, seconds in zip(trial.steps, trial.seconds(), strict=True)
        if not step.prompt_tokens
    ]
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def quantization(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Perplexity, and held-out questions answered, with weights in each format."""
    for name in args.formats:
        driver = _driver(64, **{"dtype" if name in DTYPES else "quantize": name})
        good = held_out(driver, tokenizer)
        yield Row(
            "quantization",
            {"weights": name},
            {
                "perplexity": f"{perplexity(driver, tokenizer):.4f}",
                "held_out_answered": sum(good),
                "held_out_asked": len(good),
            },
        )


def perplexity(driver: Driver, tokenizer: Tokenizer) -> float:
    """Perplexity of the topics' answers, given their questions."""
    topics, questions = read_corpus().topics, {}
    for prompt, topic in zip(topic_prompts(tokenizer, topics), topics, strict=True):
        text = (*prompt, *tokenizer.encode(topic.answer[0]), tokenizer.eos)
        if len(text) <= CONTEXT_LENGTH:
            questions[driver.add(text, 0, prompt_logprobs=True)] = len(prompt)
    driver.finish()
    scores = [
        entry.logprob
        for request, length in questions.items()
        for entry in driver.logprobs[request][length:]
    ]
    return math.exp(-statistics.fmean(scores))


def held_out(driver: Driver, tokenizer: Tokenizer) -> list[bool]:
    """Which held-out questions are answered sensibly, greedily."""
    requests = {
        driver.add(
            tuple(prompt_of(tokenizer, question)), ANSWER_LENGTH, stop_ids=[tokenizer.eos]
        ): question
        for question in read_questions()
    }
    driver.finish()
    good = []
    for request, question in requests.items():
        ids = driver.answers[request]
        said = Answer(tokenizer.decode(ids).strip(), stopped=len(ids) < ANSWER_LENGTH)
        good.append(is_sensible(question, said))
    return good


def _driver(streams: int, **settings: str | int) -> Driver:
    options = {"dtype": "float32", "quantize": "none", "device": "cpu", **settings}
    return Driver(
        load_replica(
            ReplicaOptions(CHECKPOINT, CONTEXT_LENGTH, streams, **options)  # type: ignore[arg-type]
        )
    )


CASES: dict[str, Callable[[Tokenizer, argparse.Namespace], Iterator[Row]]] = {
    "speculation": speculation,
    "quantization": quantization,
}

if __name__ == "__main__":
    main()
