"""The effect of speculation and quantization on real text: python -m bench.demonstration

On the demonstration checkpoint, because random weights neither repeat a text nor answer a question.

`speculation`: two texts, dialogs whose last turn asks an earlier question again, so that the answer
repeats, and single questions at temperature 1, which repeat nothing. Each is answered with and
without drafts in turn, round after round, and the tokens must be equal. Rates are of the steps
without prompt tokens; the two halves of a round meet the machine in the same minute. Answers end
where the model ends them: forced to 64 tokens their second half repeats nothing, and the gain was
1.49 instead of 3.19.

`quantization`: perplexity of the first written answer to every topic, and of the end of sequence
behind it, given the question: exp of the mean negative logprob per token. Held-out questions have
no written answer, but how many of them a quantized model still answers sensibly is a second figure.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.report import RESULTS, Recorder, Row, spread
from demo.checkpoint import CHECKPOINT, TOKENIZER
from demo.evaluate import Answer, is_sensible, prompt_of, topic_prompts
from demo.text import expand, read_corpus, read_questions
from demo.tokenizer import Tokenizer
from model_service.engine.engine import Engine
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions

CONTEXT_LENGTH = 512
REPEATED_LENGTH = 64  # tokens of an answer at most, in the case speculation
ANSWER_LENGTH = 256  # in the case quantization
DRAFT_TOKENS = ReplicaOptions(CHECKPOINT).draft_tokens
GREEDY = SamplingParams(temperature=0.0)
FORMATS = {  # name: dtype of activations, quantization
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("float32", "int8"),
    "int4": ("float32", "int4"),
    "fp8": ("float32", "fp8"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demonstration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=[*CASES])
    add("--formats", nargs="+", choices=FORMATS, default=[*FORMATS], help="of the weights")
    add("--rounds", type=int, default=7, help="of the case speculation")
    add("--dialogs", type=int, default=16, help="answered per round")
    add("--streams", type=int, nargs="+", default=[1, 8])
    add("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    recorder = Recorder("demonstration", args.results)
    tokenizer = Tokenizer.load(CHECKPOINT / TOKENIZER)
    for case in args.cases:
        recorder.attempt(case, lambda case=case: CASES[case](tokenizer, args))  # type: ignore[misc]
    print(recorder.write() / "result.md")
    if recorder.failed:
        raise SystemExit(1)


def speculation(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Text that repeats and text that does not, for each number of streams."""
    whole = SamplingParams(temperature=1.0, top_p=1.0)
    texts = {
        "repeats": (_repeating(tokenizer, args.dialogs), GREEDY),
        "new": (topic_prompts(tokenizer, read_corpus().topics)[: args.dialogs], whole),
    }
    ends = frozenset({tokenizer.eos})
    for streams in args.streams:
        for text, (prompts, sampling) in texts.items():
            requests = [
                GenerationRequest(number, tuple(prompt), REPEATED_LENGTH, sampling, ends)
                for number, prompt in enumerate(prompts)
            ]
            yield _with_and_without_drafts(text, requests, streams, args.rounds)


def _repeating(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Dialogs that ask a topic, another one, and the first one again."""
    topics = [topic for topic in read_corpus().topics if len(topic.answer[0]) > 80]
    asked = [(expand(topic.ask[0])[0], topic.answer[0]) for topic in topics]
    return [
        tokenizer.prompt([*asked[i], *asked[-1 - i], asked[i][0]])
        for i in range(min(count, len(asked)))
    ]


def _with_and_without_drafts(
    text: str, requests: Sequence[GenerationRequest], streams: int, rounds: int
) -> Row:
    engines = {drafts: _engine(streams, draft_tokens=drafts) for drafts in (0, DRAFT_TOKENS)}
    rates: dict[int, list[float]] = {drafts: [] for drafts in engines}
    for number in range(rounds + 1):  # the first is not counted
        ids = []
        for drafts in sorted(engines, reverse=number % 2 == 0):
            outputs, rate = answer(engines[drafts], requests)
            ids.append({request: _ids(each) for request, each in outputs.items()})
            if number:
                rates[drafts].append(rate)
        if ids[0] != ids[1]:
            raise RuntimeError("drafts changed an answer")
    without, drafted = rates[0], rates[DRAFT_TOKENS]
    load = engines[DRAFT_TOKENS].load()
    return Row(
        "speculation",
        {"text": text, "streams": streams},
        {
            "without_tokens_per_s": statistics.median(without),
            "with_tokens_per_s": statistics.median(drafted),
            **spread("ratio", [b / a for a, b in zip(without, drafted, strict=True)]),
            "drafted": load.drafted_tokens,
            "accepted": load.accepted_tokens,
        },
    )


def quantization(tokenizer: Tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Perplexity, and held-out questions answered, with weights in each format."""
    for name in args.formats:
        dtype, quantize = FORMATS[name]
        engine = _engine(64, dtype=dtype, quantize=quantize)
        good, asked = held_out(engine, tokenizer)
        yield Row(
            "quantization",
            {"weights": name},
            {
                "perplexity": f"{perplexity(engine, tokenizer):.4f}",
                "held_out_answered": good,
                "held_out_asked": asked,
            },
        )


def perplexity(engine: Engine, tokenizer: Tokenizer) -> float:
    """Perplexity of the topics' answers, given their questions."""
    topics, starts, requests = read_corpus().topics, {}, []
    for number, prompt in enumerate(topic_prompts(tokenizer, topics)):
        text = [*prompt, *tokenizer.encode(topics[number].answer[0]), tokenizer.eos]
        if len(text) <= CONTEXT_LENGTH:
            starts[number] = len(prompt)
            request = GenerationRequest(number, tuple(text), 0, GREEDY, prompt_logprobs=True)
            requests.append(request)
    scores = [
        entry.logprob
        for number, outputs in answer(engine, requests)[0].items()
        for entry in [each for output in outputs for each in output.logprobs][starts[number] :]
    ]
    return math.exp(-statistics.fmean(scores))


def held_out(engine: Engine, tokenizer: Tokenizer) -> tuple[int, int]:
    """Questions answered sensibly, greedily, and questions asked."""
    questions, ends = read_questions(), frozenset([tokenizer.eos])
    requests = [
        GenerationRequest(
            number, tuple(prompt_of(tokenizer, question)), ANSWER_LENGTH, GREEDY, ends
        )
        for number, question in enumerate(questions)
    ]
    outputs, _ = answer(engine, requests)
    answers = [
        Answer(
            tokenizer.decode(_ids(outputs[number])).strip(),
            outputs[number][-1].finish_reason is FinishReason.STOP,
        )
        for number in range(len(questions))
    ]
    return sum(map(is_sensible, questions, answers)), len(questions)


def _engine(streams: int, **settings: str | int) -> Engine:
    options = {"dtype": "float32", "quantize": "none", "device": "cpu", **settings}
    return load_replica(
        ReplicaOptions(CHECKPOINT, CONTEXT_LENGTH, streams, **options)  # type: ignore[arg-type]
    ).engine()


def answer(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> tuple[dict[int, list[SequenceOutput]], float]:
    """All outputs by request, and the tokens per second of the steps without prompt tokens."""
    for request in requests:
        engine.add(request)
    outputs: dict[int, list[SequenceOutput]] = {}
    tokens, seconds = 0, 0.0
    while engine.has_work:
        computed, started = engine.load().prompt_tokens, time.perf_counter()
        made = engine.step()
        elapsed = time.perf_counter() - started
        for output in made:
            outputs.setdefault(int(str(output.request_id)), []).append(output)
        if engine.load().prompt_tokens == computed:
            tokens += sum(len(output.ids) for output in made)
            seconds += elapsed
    return outputs, tokens / seconds if seconds else 0.0


def _ids(outputs: Sequence[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.ids]


CASES: dict[str, Callable[[Tokenizer, argparse.Namespace], Iterator[Row]]] = {
    "speculation": speculation,
    "quantization": quantization,
}

if __name__ == "__main__":
    main()
