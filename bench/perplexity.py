"""What quantization costs on the demonstration checkpoint: python -m bench.perplexity

Perplexity of the first answer to every topic of its text, and of the end of sequence behind it,
given the question: exp of the mean negative logprob per token. Held-out questions have no written
answer, but how many of them a quantized model still answers sensibly is the second figure.
"""

import argparse
import math
from typing import cast

from demo.checkpoint import CHECKPOINT, TOKENIZER
from demo.evaluate import Answer as DemoAnswer
from demo.evaluate import is_sensible, prompt_of, topic_prompts
from demo.text import read_corpus, read_questions
from demo.tokenizer import Tokenizer
from model_service.engine.engine import Engine
from model_service.engine.sequence import FinishReason, GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import Dtype, Quantize, ReplicaOptions

CONTEXT_LENGTH = 512
ANSWER_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.perplexity", description=__doc__)
    parser.parse_args()
    tokenizer = Tokenizer.load(CHECKPOINT / TOKENIZER)
    print("| weights | perplexity | held-out questions answered |\n|---|---|---|")
    for dtype, quantize in (
        ("float32", "none"),
        ("bfloat16", "none"),
        ("float32", "int8"),
        ("float32", "int4"),
        ("float32", "fp8"),
    ):
        options = ReplicaOptions(
            CHECKPOINT,
            CONTEXT_LENGTH,
            max_batch_size=64,
            dtype=cast("Dtype", dtype),
            quantize=cast("Quantize", quantize),
            device="cpu",
        )
        engine = load_replica(options).engine()
        name = dtype if quantize == "none" else quantize
        good, asked = held_out(engine, tokenizer)
        print(f"| {name} | {perplexity(engine, tokenizer):.4f} | {good} of {asked} |", flush=True)


def perplexity(engine: Engine, tokenizer: Tokenizer) -> float:
    """Of the topics' answers, given their questions."""
    topics = read_corpus().topics
    starts = {}
    for number, (prompt, topic) in enumerate(
        zip(topic_prompts(tokenizer, topics), topics, strict=True)
    ):
        answer = [*tokenizer.encode(topic.answer[0]), tokenizer.eos]
        if len(prompt) + len(answer) > CONTEXT_LENGTH:
            continue
        starts[number] = len(prompt)
        engine.add(
            GenerationRequest(
                number,
                (*prompt, *answer),
                max_gen_len=0,
                sampling=SamplingParams(temperature=0.0),
                prompt_logprobs=True,
            )
        )
    total, tokens = 0.0, 0
    while engine.has_work:
        for output in engine.step():
            scored = [entry.logprob for entry in output.logprobs]
            start = starts[int(str(output.request_id))]
            total -= sum(scored[start:])
            tokens += len(scored) - start
    return math.exp(total / tokens)


def held_out(engine: Engine, tokenizer: Tokenizer) -> tuple[int, int]:
    """Questions answered sensibly, greedily, and questions asked."""
    questions = read_questions()
    for number, question in enumerate(questions):
        engine.add(
            GenerationRequest(
                number,
                tuple(prompt_of(tokenizer, question)),
                max_gen_len=ANSWER_LENGTH,
                sampling=SamplingParams(temperature=0.0),
                stop_ids=frozenset([tokenizer.eos]),
            )
        )
    ids: dict[int, list[int]] = {number: [] for number in range(len(questions))}
    stopped = set()
    while engine.has_work:
        for output in engine.step():
            number = int(str(output.request_id))
            ids[number] += output.ids
            if output.finish_reason is FinishReason.STOP:
                stopped.add(number)
    answers = [
        DemoAnswer(tokenizer.decode(ids[number]).strip(), number in stopped)
        for number in range(len(questions))
    ]
    return sum(map(is_sensible, questions, answers)), len(questions)


if __name__ == "__main__":
    main()
