"""A tokenizer.json with the files beside it, as transformers reads them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.model_files import ModelFileError, answer_end_ids, chat_template, tokenizer_config
from tokenizer_service.tokenizer import SpecialIds, Tokenizer
from tokenizer_service.vocabularies import stages
from tokenizer_service.vocabularies.byte_pairs import BytePairVocabulary, token_ids

# The ends of texts of Llama 2, Llama 3 and GPT-2, for a tokenizer.json without files beside it.
_KNOWN_ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in this file; ModelFileError if it cannot be used exactly."""
    content = path.read_bytes()
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not JSON: {error}; download it again") from error
    config = tokenizer_config(path)
    names = {key: _name(config.get(f"{key}_token")) for key in ("bos", "eos", "pad")}
    ends = answer_end_ids(path)
    try:
        if not isinstance(description, dict):
            raise ValueError("it holds no object")
        ids = token_ids(description)
        named_bos = ids.get(names["bos"], -1)
        bos = _bos_id(description, config, named_bos)
        eos = _eos_id(path, ids, names["eos"], ends)
        vocabulary = BytePairVocabulary(description, {named_bos, bos, eos})
    except ModelFileError:
        raise
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not a usable tokenizer.json: {error}") from error
    return Tokenizer(
        vocabulary,
        special_ids(
            path,
            bos=bos,
            eos=eos,
            pad=ids.get(names["pad"], -1),
            ends=ends,
            count=len(vocabulary.pieces),
        ),
        fingerprint=hashlib.sha256(content).hexdigest(),
        chat_template=chat_template(path),
    )


def special_ids(
    path: Path, *, bos: int, eos: int, pad: int, ends: tuple[int, ...], count: int
) -> SpecialIds:
    """The ids of control tokens, or a ModelFileError if one is not in the vocabulary."""
    for name, token_id in [
        ("BOS", bos),
        ("EOS", eos),
        *(("end of an answer", each) for each in ends),
    ]:
        if not (token_id < count and (token_id >= 0 or name == "BOS")):
            raise ModelFileError(
                f"{path} has {count} tokens, but by the files that came with it {token_id} is the "
                f"id of {name}; use the tokenizer that came with the checkpoint"
            )
    return SpecialIds(bos, eos, pad, tuple(dict.fromkeys((eos, *ends))))


def _name(token: object) -> str:
    """The name of a special token; tokenizer_config.json writes it alone or in an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _bos_id(description: Mapping[str, Any], config: Mapping[str, Any], named: int) -> int:
    """The id that is put in front of a text, or -1; ValueError if it is not a single one."""
    adds = config.get("add_bos_token")
    processor = description.get("post_processor")
    if adds is None and processor is None:
        adds = str(config.get("tokenizer_class", "")).startswith("Llama")
    if adds is not None:
        return named if adds else -1
    template = stages.find(processor, "TemplateProcessing")
    if template is None:
        return -1
    match template.get("single"):
        case [{"Sequence": _}, *_]:
            return -1
        case [{"SpecialToken": {"id": str(name)}}, {"Sequence": _}, *_]:
            ids = template.get("special_tokens", {}).get(name, {}).get("ids")
            if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int and ids[0] >= 0:
                return int(ids[0])
    raise ValueError("its post_processor puts something else than one token in front of a text")


def _eos_id(path: Path, ids: Mapping[str, int], named: str, ends: tuple[int, ...]) -> int:
    for name in (named, *(() if named or ends else _KNOWN_ENDS)):
        if name in ids:
            return ids[name]
    if ends:
        return ends[0]
    raise ModelFileError(
        f"{path} does not say which token ends a text: put the tokenizer_config.json that came "
        "with the checkpoint beside it"
    )
