"""Asks a checkpoint questions and scores the answers: python -m demo.evaluate

Held-out questions are wordings that training never saw. An answer counts if it stops by itself and
holds one of the expected words. All questions are answered at once, in float32.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from demo.checkpoint import CHECKPOINT, TOKENIZER
from demo.dialogs import NONSENSE
from demo.text import Question, Topic, expand, read_corpus, read_questions
from demo.tokenizer import Tokenizer
from llama import Llama

CONTEXT_LENGTH = 512
ANSWER_LENGTH = 256  # tokens; good answers are much shorter
AT_ONCE = 64  # questions that run at once


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint on the engine that serves it."""

    llama: Llama
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: Path = CHECKPOINT, seed: int = 1) -> Self:
        path = folder / TOKENIZER
        llama = Llama.build(str(folder), str(path), CONTEXT_LENGTH, AT_ONCE, seed=seed)
        return cls(llama, Tokenizer.load(path))

    def answer(self, prompts: list[list[int]], temperature: float, top_p: float) -> list[Answer]:
        """Continues prompts of token ids."""
        answers, _ = self.llama.generate(prompts, ANSWER_LENGTH, temperature, top_p)
        return [
            Answer(self.tokenizer.decode(ids).strip(), _stopped(prompt, ids))
            for prompt, ids in zip(prompts, answers, strict=True)
        ]


def _stopped(prompt: list[int], answer: list[int]) -> bool:
    return len(answer) < min(ANSWER_LENGTH, CONTEXT_LENGTH - len(prompt))


def prompt_of(tokenizer: Tokenizer, question: Question) -> list[int]:
    return tokenizer.prompt([*question.turns, question.ask], question.system)


def is_sensible(question: Question, answer: Answer) -> bool:
    said = answer.text.lower()
    return answer.stopped and any(words.lower() in said for words in question.says)


def topic_prompts(tokenizer: Tokenizer, topics: Sequence[Topic]) -> list[list[int]]:
    """The first wording of every topic, as the first question of a dialog."""
    wordings = [expand(topic.ask[0])[0].replace(NONSENSE, "Zorblax") for topic in topics]
    return [tokenizer.prompt([wording]) for wording in wordings]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--ckpt_dir", type=Path, default=CHECKPOINT, help="folder to evaluate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", type=float, default=0.9, help="mass to sample from")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling")
    parser.add_argument("--system", help="system message for --ask")
    parser.add_argument("--ask", nargs="+", help="turns of one dialog instead of the questions")
    parser.add_argument("--all", action="store_true", help="show good answers too")
    args = parser.parse_args()
    model = Model.load(args.ckpt_dir, args.seed)
    tokenizer, sampling = model.tokenizer, (args.temperature, args.top_p)
    if args.ask:
        messages: list[str] = []
        for user in args.ask:
            prompt = tokenizer.prompt([*messages, user], args.system)
            answer = model.answer([prompt], *sampling)[0]
            print(f"> {user}\n{answer.text}{'' if answer.stopped else ' …'}\n")
            messages += [user, answer.text]
        return
    questions = read_questions()
    prompts = [prompt_of(tokenizer, question) for question in questions]
    answers = model.answer(prompts, *sampling)
    good = [is_sensible(q, a) for q, a in zip(questions, answers, strict=True)]
    for question, answer, ok in zip(questions, answers, good, strict=True):
        if args.all or not ok:
            print(f"{'ok ' if ok else 'BAD'} {question.ask!r}\n    {answer.text!r}")
    topics = read_corpus().topics
    replies = model.answer(topic_prompts(tokenizer, topics), *sampling)
    known = [a.text in t.answer for t, a in zip(topics, replies, strict=True)]
    for topic, answer, ok in zip(topics, replies, known, strict=True):
        if not ok:
            print(f"BAD topic {topic.name}: {expand(topic.ask[0])[0]!r}\n    {answer.text!r}")
    print(
        f"held out {sum(good)}/{len(good)}, training topics word for word "
        f"{sum(known)}/{len(known)}, stopped {sum(a.stopped for a in replies)}/{len(replies)}"
    )


if __name__ == "__main__":
    main()
