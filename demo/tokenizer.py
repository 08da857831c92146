"""The demonstration tokenizer: SentencePiece with Llama 2's settings, for prompts in Meta's format.

As in Llama 2, the tags of the prompt are plain text and not special symbols. A finished turn is
encoded as one segment that begins with the tokens of the open turn, so that training knows where
the answer begins.
"""

import itertools
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import sentencepiece

from demo.dialogs import Dialog
from llama.prompt_format.dialog import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    finished_turn,
    open_turn,
    render,
)

Example = tuple[list[int], list[bool]]
"""The tokens of a training sequence, and for each whether the model is to learn it."""


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model. `lines` hold no newlines, so these become bytes, as in Llama 2."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


class Tokenizer:
    def __init__(self, model: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        return cls(path.read_bytes())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode(list(ids))
        return text

    def prompt(self, messages: Sequence[str], system: str | None = None) -> list[int]:
        """Token ids of a dialog that waits for its next answer.

        Args:
            messages: user, assistant, user, ...; an odd number.
            system: the system message, if there is one.
        """
        dialog = [] if system is None else [Message(SYSTEM, system)]
        dialog += map(Message, itertools.cycle((USER, ASSISTANT)), messages)
        ids: list[int] = []
        for segment in render(dialog):
            ids += [self.bos, *self.encode(segment.text), *[self.eos] * segment.eos]
        return ids

    def example(self, dialog: Dialog) -> Example:
        ids: list[int] = []
        learn: list[bool] = []
        for user, turn in dialog.pairs():
            asked = [self.bos, *self.encode(open_turn(user))]
            whole = [self.bos, *self.encode(finished_turn(user, turn.assistant)), self.eos]
            if whole[: len(asked)] != asked:
                raise ValueError(f"the tokens of an open turn change when it is answered: {turn}")
            ids += whole
            learn += [False] * len(asked) + [turn.learn] * (len(whole) - len(asked))
        return ids, learn

    def passage(self, parts: Sequence[str]) -> Example:
        """A text whose parts are encoded one by one, as a prompt and its completion are."""
        ids = [self.bos, *(token for part in parts for token in self.encode(part)), self.eos]
        return ids, [False] + [True] * (len(ids) - 1)
