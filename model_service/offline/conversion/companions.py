"""The files that belong to a model beside its weights: tokenizer, chat template, licence."""

from pathlib import Path

TOKENIZER = "tokenizer.model"
_NAMES = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PATTERNS = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*")


def companions(path: Path) -> list[Path]:
    """The files beside the weights at `path` that a converted model needs, too.

    Meta's downloads have the tokenizer one folder up. The tokenizer of a GGUF file is in it.
    """
    if path.is_file():
        return []
    found = [path / name for name in _NAMES if (path / name).is_file()]
    found += sorted(file for pattern in _PATTERNS for file in path.glob(pattern) if file.is_file())
    beside = path.resolve().parent / TOKENIZER
    has_tokenizer = any((path / name).is_file() for name in (TOKENIZER, "tokenizer.json"))
    if not has_tokenizer and beside.is_file():
        found.append(beside)
    return found
