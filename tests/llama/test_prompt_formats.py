"""Dialogs of models in this process, whose files have a chat template."""

from pathlib import Path

import pytest

from llama import Dialog, Llama
from llama.prompt_format.formats import FORMATS
from serving.errors import StartError
from tests.llama.conftest import DIALOG, GOLDEN, REFUSAL, TOKENIZER
from tests.llama.prompt_format.templates import ZEPHYR
from tests.llama.prompt_format.tokenizer_folders import llama_folder


def build(folder: Path) -> Llama:
    return Llama.build(str(GOLDEN / "checkpoints" / "gqa-mp1"), str(folder), 256, 4)


def test_dialog_is_answered_in_the_format_of_the_template(tmp_path: Path) -> None:
    llama = build(llama_folder(tmp_path, ZEPHYR, model_file=Path(TOKENIZER)))
    encode = llama.tokenizer.encode
    prompt = encode("<|user|>\nWhat do llamas eat?", bos=False, eos=False)
    prompt += encode("\n<|assistant|>\n", bos=False, eos=False, control_token="</s>")
    [answer] = llama.chat_completion([DIALOG], temperature=0, max_gen_len=8)
    expected, _ = llama.generate([prompt], temperature=0, max_gen_len=8)
    assert answer["generation"]["content"] == llama.tokenizer.decode(expected[0])


def test_special_tags_are_those_of_the_format(tmp_path: Path) -> None:
    llama = build(llama_folder(tmp_path, ZEPHYR, model_file=Path(TOKENIZER)))
    dialogs: list[Dialog] = [
        [{"role": "user", "content": text}] for text in ("a <|user|>", "an [INST]")
    ]
    answers = llama.chat_completion(dialogs, temperature=0, max_gen_len=1)
    assert [each["generation"]["content"] == REFUSAL for each in answers] == [True, False]


def test_model_with_an_unknown_template_is_not_loaded(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, "{{ messages }}", model_file=Path(TOKENIZER))
    with pytest.raises(StartError, match=r"template .* is unknown: .*--prompt_format") as refused:
        build(folder)
    assert all(name in str(refused.value) for name in FORMATS)
