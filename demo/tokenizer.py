"""The demonstration tokenizer: SentencePiece with Llama 2's settings, and Meta's prompt format.

The tags of the prompt are plain text and no special symbols, as in Llama 2. A finished turn is
encoded as one segment, of which the open turn's tokens are a prefix; training relies on that to
know where the answer begins.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import sentencepiece

from demo.dialogs import Dialog

Example = tuple[list[int], list[bool]]
"""The tokens of a training sequence, and for each whether the model is to learn it."""


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model; newlines are never in `lines`, so they become bytes, as in Llama 2."""
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


def fold(system: str | None, user: str) -> str:
    """The first user message with the system message in front of it, as Meta folds them."""
    return user if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"


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
        users = [fold(system, messages[0]), *messages[2::2]]
        ids: list[int] = []
        for user, assistant in zip(users, messages[1::2], strict=False):
            segment = f"[INST] {user.strip()} [/INST] {assistant.strip()} "
            ids += [self.bos, *self.encode(segment), self.eos]
        return [*ids, self.bos, *self.encode(f"[INST] {users[-1].strip()} [/INST]")]

    def example(self, dialog: Dialog) -> Example:
        ids: list[int] = []
        learn: list[bool] = []
        for i, turn in enumerate(dialog.turns):
            user = fold(dialog.system, turn.user) if i == 0 else turn.user
            asked = [self.bos, *self.encode(f"[INST] {user.strip()} [/INST]")]
            segment = self.encode(f"[INST] {user.strip()} [/INST] {turn.assistant.strip()} ")
            whole = [self.bos, *segment, self.eos]
            if whole[: len(asked)] != asked:
                raise ValueError(f"the tokens of an open turn change when it is answered: {turn}")
            ids += whole
            learn += [False] * len(asked) + [turn.learn] * (len(whole) - len(asked))
        return ids, learn

    def passage(self, parts: Sequence[str]) -> Example:
        """A text whose parts are encoded one by one, as a prompt and its completion are."""
        ids = [self.bos, *(token for part in parts for token in self.encode(part)), self.eos]
        return ids, [False] + [True] * (len(ids) - 1)
