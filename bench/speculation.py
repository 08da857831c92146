"""What speculation gains and costs on the demonstration checkpoint: python -m bench.speculation

Two texts: dialogs whose last turn asks an earlier question again, so that the answer repeats; and
single questions, answered at temperature 1 from the whole distribution, which repeat nothing. Each
is answered, to the end that the model gives it, with and without drafts in turn, round after round,
and the tokens must be equal. The ratio is the median of the rounds' ratios: a round's two halves
meet the machine in the same minute.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bench.report import RESULTS, Row, make_report, result_folder, write_report
from bench.summary import summarize
from demo.checkpoint import CHECKPOINT, TOKENIZER
from demo.evaluate import topic_prompts
from demo.text import expand, read_corpus
from demo.tokenizer import Tokenizer
from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions

CONTEXT_LENGTH = 512
ANSWER_LENGTH = 64  # at most
DRAFT_TOKENS = ReplicaOptions(CHECKPOINT).draft_tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dialogs", type=int, default=16, help="answered per round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(CHECKPOINT / TOKENIZER)
    texts = {
        "repeats": (_repeating(tokenizer, args.dialogs), SamplingParams(temperature=0.0)),
        "new": (_new(tokenizer, args.dialogs), SamplingParams(temperature=1.0, top_p=1.0)),
    }
    ends = frozenset({tokenizer.eos})
    rows = [
        _measure(
            text,
            [
                GenerationRequest(number, tuple(prompt), ANSWER_LENGTH, sampling, ends)
                for number, prompt in enumerate(prompts)
            ],
            streams,
            args.rounds,
        )
        for streams in args.streams
        for text, (prompts, sampling) in texts.items()
    ]
    report = make_report("speculation", rows, (), {"checkpoint": "demonstration, float32"})
    folder = result_folder(report, args.results)
    write_report(report, folder)
    print(folder / "result.md")


def _repeating(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Dialogs that ask a topic, another one, and the first one again."""
    topics = [topic for topic in read_corpus().topics if len(topic.answer[0]) > 80]
    asked = [(expand(topic.ask[0])[0], topic.answer[0]) for topic in topics]
    return [
        tokenizer.prompt([*asked[i], *asked[-1 - i], asked[i][0]])
        for i in range(min(count, len(asked)))
    ]


def _new(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Single questions."""
    return topic_prompts(tokenizer, read_corpus().topics)[:count]


def _measure(text: str, requests: Sequence[GenerationRequest], streams: int, rounds: int) -> Row:
    engines = {drafts: _engine(streams, drafts) for drafts in (0, DRAFT_TOKENS)}
    rates: dict[int, list[float]] = {drafts: [] for drafts in engines}
    answers = {}
    for number in range(rounds + 1):  # the first is not counted
        for drafts in sorted(engines, reverse=number % 2 == 0):
            answers[drafts], tokens, seconds = _answer(engines[drafts], requests)
            rates[drafts].append(tokens / seconds)
    if answers[0] != answers[DRAFT_TOKENS]:
        raise AssertionError("drafts changed an answer")
    without, with_drafts = (summarize(rates[drafts][1:]) for drafts in engines)
    ratios = summarize([b / a for a, b in zip(*(r[1:] for r in rates.values()), strict=True)])
    load = engines[DRAFT_TOKENS].load()
    return Row(
        "speculation",
        {"text": text, "streams": streams},
        {
            "without_tokens_per_s": without.median,
            "with_tokens_per_s": with_drafts.median,
            "ratio": ratios.median,
            "low": ratios.low,
            "high": ratios.high,
            "drafted": load.drafted_tokens,
            "accepted": load.accepted_tokens,
        },
    )


def _engine(streams: int, draft_tokens: int) -> Engine:
    options = ReplicaOptions(
        CHECKPOINT,
        CONTEXT_LENGTH,
        max_batch_size=streams,
        dtype="float32",
        device="cpu",
        draft_tokens=draft_tokens,
    )
    return load_replica(options).engine()


def _answer(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> tuple[dict[int, list[int]], int, float]:
    """All answers, their tokens, and the seconds of the steps in which nothing but answers grew."""
    for request in requests:
        engine.add(request)
    answers: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    made, seconds = 0, 0.0
    while engine.has_work:
        computed, started = engine.load().prompt_tokens, time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - started
        for output in outputs:
            answers[int(str(output.request_id))] += output.ids
        if engine.load().prompt_tokens == computed:
            made += sum(len(output.ids) for output in outputs)
            seconds += elapsed
    return answers, made, seconds


if __name__ == "__main__":
    main()
