"""The effect of speculation and quantization on real text, the demonstration checkpoint's.

`speculation`: dialogs whose last turn asks an earlier question again, so that the answer repeats,
and single questions at temperature 1, which repeat nothing. Each is answered with and without
drafts in turn, and the tokens must be equal. Rates are of the steps without prompt tokens.

`draft`: topics that the model knows, answered greedily, and topics at a high temperature, which no
draft foresees, with and without a draft model of a quarter of its size. That is trained in the same
way on the same text, once, which takes some ten minutes of one core, and kept in --work_dir.

`quantization`: perplexity of the first written answer to every topic, and of the end of sequence
behind it, given the question; and how many held-out questions are answered sensibly.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.checkpoint import complete_or_absent
from bench.engine.driver import GREEDY, Driver, Prompt, Setting, Trial, in_own_process
from bench.report import WORK_DIR, Recorder, Row, Value, command_parser, finish, spread
from demo.checkpoint import CHECKPOINT, TOKENIZER, text_digest
from demo.evaluate import Answer, is_sensible, prompt_of, topic_prompts
from demo.text import expand, read_corpus, read_questions
from demo.tokenizer import Tokenizer
from demo.train import Settings, train
from model_service.engine.scheduling.speculation.drafters import Source
from model_service.engine.sequence import SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import DTYPES

CONTEXT_LENGTH = 512
REPEATED_LENGTH = 64  # tokens of an answer at most, in the case speculation
ANSWER_LENGTH = 256  # tokens at most, in the case quantization
DRAFT_TOKENS = ReplicaOptions(CHECKPOINT).draft_tokens
# Settings of the draft model's training that differ from the demonstration model's.
SMALLER = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "batch_tokens": 2048}
FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")


def main(arguments: list[str] | None = None) -> None:
    parser = command_parser("demonstration", __doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=["speculation", "quantization"])
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="of the weights")
    add("--rounds", type=int, default=21, help="of the cases speculation and draft")
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps the draft model between runs")
    add("--draft_steps", type=int, default=2800, help="of the draft model's training")
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
    yield from _compared("speculation", texts, tokenizer, args, {"draft_tokens": DRAFT_TOKENS})


def draft(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Text that a draft model foresees and text that it does not, for each number of streams."""
    folder = args.work_dir / f"draft-{args.draft_steps}-{text_digest()[:12]}"
    if not folder.exists():
        settings = dataclasses.replace(Settings(), steps=args.draft_steps, **SMALLER)
        with complete_or_absent(folder) as partial:
            in_own_process(train, settings, partial)
    prompts = topic_prompts(tokenizer, read_corpus().topics)[: args.dialogs]
    texts = {
        "known": (prompts, GREEDY),
        "known, temperature 0.6": (prompts, SamplingParams(temperature=0.6, top_p=0.9)),
        "temperature 2": (prompts, SamplingParams(temperature=2.0, top_p=1.0)),
    }
    model = {"draft_tokens": DRAFT_TOKENS, "draft_ckpt_dir": folder}
    yield from _compared("draft", texts, tokenizer, args, model)


def _compared(
    case: str,
    texts: Mapping[str, tuple[list[list[int]], SamplingParams]],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    settings: Mapping[str, Setting | Path],
) -> Iterator[Row]:
    """A row for each text and number of streams: with these settings, and without drafts."""
    for streams in args.streams:
        for text, (prompts, sampling) in texts.items():
            found = _with_and_without_drafts(
                [(tuple(prompt), REPEATED_LENGTH, sampling, [tokenizer.eos]) for prompt in prompts],
                streams,
                args.rounds,
                settings,
            )
            yield Row(case, {"text": text, "streams": streams}, found)


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
    settings: Mapping[str, Setting | Path],
) -> dict[str, Value]:
    """The columns of one row; `requests` are arguments of `Driver.add`."""
    drivers = {False: _driver(streams, draft_tokens=0), True: _driver(streams, **settings)}
    rates: dict[bool, list[float]] = {drafts: [] for drafts in drivers}
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
    without, drafted = rates[False], rates[True]
    load = drivers[True].engine.load()
    return {
        "without_tokens_per_s": statistics.median(without),
        "with_tokens_per_s": statistics.median(drafted),
        **spread("ratio", [b / a for a, b in zip(without, drafted, strict=True)]),
        "drafted": load.drafted_tokens,
        "accepted": load.accepted_tokens,
        "drafted_by_model": load.drafts[Source.MODEL].drafted,
        "accepted_by_model": load.drafts[Source.MODEL].accepted,
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


def _driver(streams: int, **settings: Setting | Path) -> Driver:
    options = {"dtype": "float32", "quantize": "none", "device": "cpu", **settings}
    return Driver(
        load_replica(
            ReplicaOptions(CHECKPOINT, CONTEXT_LENGTH, streams, **options)  # type: ignore[arg-type]
        )
    )


CASES: dict[str, Callable[[Tokenizer, argparse.Namespace], Iterator[Row]]] = {
    "speculation": speculation,
    "draft": draft,
    "quantization": quantization,
}

if __name__ == "__main__":
    main()
