"""Prints how many multiple-choice questions the served model answers rightly.

python examples/python/multiple_choice.py FILE [host:port]

FILE has a JSON object in each line: `question` with `choices` as a chat model would give them, or
`prompt` with `choices` that continue it, and `answer`, the index of the right one. The choice with
the highest logprob counts as the model's, and in a second count the one with the highest logprob
per byte, which is fair to long choices.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chasqui import DEFAULT_TARGET, Client, Message


def logprobs(client: Client, question: dict[str, Any]) -> list[float]:
    """The logprob of each choice."""
    prompt: str | list[Message] = question.get("prompt", "")
    if "question" in question:
        prompt = [{"role": "user", "content": question["question"]}]
    return [score.logprob for score in client.score(prompt, question["choices"])]


def is_best(values: Sequence[float], answer: int) -> bool:
    return max(range(len(values)), key=values.__getitem__) == answer


def main(file: str, target: str = DEFAULT_TARGET) -> None:
    questions = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    right = right_by_byte = 0
    with Client(target) as client:
        for question in questions:
            scores, answer = logprobs(client, question), question["answer"]
            sizes = [len(choice.encode()) for choice in question["choices"]]
            right += is_best(scores, answer)
            by_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
            right_by_byte += is_best(by_byte, answer)
    print(f"{len(questions)} questions")
    print(f"right by logprob          {right / len(questions):.1%}")
    print(f"right by logprob per byte {right_by_byte / len(questions):.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
