"""The pre-tokenizers that GGUF files name (`tokenizer.ggml.pre`), as a tokenizer.json writes them.

They are those of llama.cpp (src/llama-vocab.cpp). A text is divided by each expression in turn:
what it matches and what lies between the matches are divided on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is divided before pieces of it are merged."""

    expressions: tuple[str, ...]
    # A part that is a token itself is not made of merges.
    ignore_merges: bool = False
    # BOS is put in front of a text, unless the file says otherwise.
    adds_bos: bool = False

    def description(self) -> Mapping[str, Any]:
        """The pre-tokenizer in a tokenizer.json."""
        splits = [
            {
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": False,
            }
            for expression in self.expressions
        ]
        to_bytes = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        return {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}


_LLAMA3 = PreTokenizer((rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",), ignore_merges=True, adds_bos=True)
_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer((rf"{_WORDS}|\p{{N}}|{_OTHERS}",)),
    "command-r": _SMOLLM,
    "refact": _SMOLLM,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
}
