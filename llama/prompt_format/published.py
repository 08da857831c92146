"""The published chat templates whose format is known, in canonical form."""

import re
from dataclasses import dataclass, replace

from llama.prompt_format.formats import (
    CHATML_MARKS,
    FORMATS,
    MISTRAL_MARKS,
    MISTRAL_TAGS,
    MISTRAL_V3_MARKS,
    VICUNA_MARKS,
    VICUNA_TAGS,
    PromptFormat,
    marked,
)
from llama.prompt_format.marks import Control, MarkedTurns, Strip

_LITERAL = r"'(?:[^'\\]|\\.)*'"


@dataclass(frozen=True, slots=True)
class PublishedTemplate:
    """A template in canonical form."""

    format: PromptFormat
    # A regular expression for the whole text.
    pattern: str
    # The format's marks, where the group `default_system` of the pattern is the system message that
    # the template writes if a dialog has none.
    marks: MarkedTurns | None = None


def _pattern(*parts: str, **patterns: str) -> str:
    """A pattern of exact parts, and of the regular expressions that they name as `⟨NAME⟩`."""
    text = re.escape("".join(parts))
    for name, pattern in patterns.items():
        text = text.replace(f"⟨{name}⟩", pattern)
    return text


_SPLIT = (
    "{%if messages[0]['role']=='system'%}{%set loop_messages=messages[1:]%}"
    "{%set system_message=messages[0]['content']%}"
)
_SPLIT_SYSTEM_FIRST = (
    "{%if messages[0]['role']=='system'%}{%set system_message=messages[0]['content']%}"
    "{%set loop_messages=messages[1:]%}{%else%}{%set loop_messages=messages%}{%endif%}"
)
_FOR_ALL = "{%for message in messages%}"
_FOR_LOOP_MESSAGES = "{%for message in loop_messages%}"
_IF_USER = "{%if message['role']=='user'%}"
_IF_ASSISTANT = "{%elif message['role']=='assistant'%}"
_END = "{%endif%}{%endfor%}"
_IF_PROMPT = "{%if add_generation_prompt%}"

_LLAMA2 = _pattern(
    _SPLIT,
    "⟨never⟩{%else%}{%set loop_messages=messages%}{%set system_message=false%}{%endif%}",
    _FOR_LOOP_MESSAGES,
    "{%if loop.first and system_message!=false%}"
    "{%set content='<<SYS>>\\n'+system_message+'\\n<</SYS>>\\n\\n'+message['content']%}"
    "{%else%}{%set content=message['content']%}{%endif%}",
    _IF_USER,
    "{{bos_token+'[INST] '+content|trim+' [/INST]'}}"
    "{%elif message['role']=='system'%}{{'<<SYS>>\\n'+content|trim+'\\n<</SYS>>\\n\\n'}}",
    _IF_ASSISTANT,
    "{{' '+content|trim+' '+eos_token}}",
    _END,
    # A default system message behind a condition that is false.
    never=rf"(?:\{{%elif (?:false|USE_DEFAULT_PROMPT)==true and not'<<SYS>>'in messages\[0\]"
    rf"\['content'\]%\}}\{{%set loop_messages=messages%\}}\{{%set system_message={_LITERAL}%\}})?",
)
_LLAMA3 = _pattern(
    "⟨alias⟩{%set content='<|start_header_id|>'+message['role']+'<|end_header_id|>\\n\\n'"
    "+message['content']|trim+'<|eot_id|>'%}"
    "{%if loop.first%}{%set content=bos_token+content%}{%endif%}{{content}}{%endfor%}"
    "⟨if⟩{{'<|start_header_id|>assistant<|end_header_id|>\\n\\n'}}⟨endif⟩",
    **{
        "alias": r"(?:\{%set loop_messages=messages%\}\{%for message in loop_messages%\}"
        r"|\{%for message in messages%\})",
        "if": r"(?:\{%if add_generation_prompt%\})?",
        "endif": r"(?:\{%endif%\})?",
    },
)
_CHATML_DEFAULT = (
    r"(?:\{%if (?:loop\.first and )?messages\[0\]\['role'\]!='system'%\}\{\{'<\|im_start\|>system"
    r"\\n(?P<default_system>(?:[^'\\]|\\.)*)<\|im_end\|>\\n'\}\}\{%endif%\})?"
)
_CHATML = (
    _FOR_ALL,
    "⟨default⟩{{'<|im_start|>'+message['role']+'\\n'+message['content']+'<|im_end|>\\n'}}{%endfor%}",
    _IF_PROMPT,
    "{{'<|im_start|>assistant\\n'}}{%endif%}",
)
_ZEPHYR = _pattern(
    _FOR_ALL,
    _IF_USER,
    "{{'<|user|>\\n'+message['content']+eos_token+'\\n'}}"
    "{%elif message['role']=='system'%}{{'<|system|>\\n'+message['content']+eos_token+'\\n'}}",
    _IF_ASSISTANT,
    "{{'<|assistant|>\\n'+message['content']+eos_token+'\\n'}}{%endif%}"
    "{%if loop.last and add_generation_prompt%}{{'<|assistant|>\\n'}}",
    _END,
)
_VICUNA = _pattern(
    _SPLIT,
    "{%else%}{%set loop_messages=messages%}{%set system_message='⟨default⟩'%}{%endif%}",
    _FOR_LOOP_MESSAGES,
    "{%if loop.first%}{{system_message}}{%endif%}",
    _IF_USER,
    "{{' USER: '+message['content']|trim}}",
    _IF_ASSISTANT,
    "{{' ASSISTANT: '+message['content']|trim+eos_token}}",
    _END,
    _IF_PROMPT,
    "{{' ASSISTANT:'}}{%endif%}",
    default=r"(?P<default_system>(?:[^'\\]|\\.)*)",
)
_MISTRAL = _pattern(
    _SPLIT_SYSTEM_FIRST,
    "{{bos_token}}",
    _FOR_LOOP_MESSAGES,
    _IF_USER,
    "{%if loop.first and system_message is defined%}"
    "{{' [INST] '+system_message+'\\n\\n'+message['content']+' [/INST]'}}"
    "{%else%}{{' [INST] '+message['content']+' [/INST]'}}{%endif%}",
    _IF_ASSISTANT,
    "{{' '+message['content']+eos_token}}",
    _END,
)
_OLD_MISTRAL = (
    "{{bos_token}}",
    _FOR_ALL,
    _IF_USER,
    "{{'[INST] '+message['content']+' [/INST]'}}",
    _IF_ASSISTANT,
    "{{message['content']+eos_token⟨space⟩}}",
    _END,
)
_MISTRAL_V3 = (
    _SPLIT_SYSTEM_FIRST,
    "{{bos_token}}",
    _FOR_LOOP_MESSAGES,
    _IF_USER,
    "{%if loop.last and system_message is defined%}"
    "{{'[INST] '+system_message+'\\n\\n'+message['content']+'[/INST]'}}"
    "{%else%}{{'[INST] '+message['content']+'[/INST]'}}{%endif%}",
    _IF_ASSISTANT,
    "{{' '+message['content']⟨trim⟩+eos_token}}",
    _END,
)
_LLAMA31 = _pattern(
    "{{bos_token}}{%set date_string='26 Jul 2024'%}"
    "{%if messages[0]['role']=='system'%}{%set system_message=messages[0]['content']|trim%}"
    "{%set messages=messages[1:]%}{%else%}{%set system_message=''%}{%endif%}"
    "{{'<|start_header_id|>system<|end_header_id|>\\n\\n"
    "Cutting Knowledge Date: December 2023\\nToday Date: '+date_string+'\\n\\n'"
    "+system_message+'<|eot_id|>'}}",
    _FOR_ALL,
    "{{'<|start_header_id|>'+message['role']+'<|end_header_id|>\\n\\n'"
    "+message['content']|trim+'<|eot_id|>'}}{%endfor%}",
    _IF_PROMPT,
    "{{'<|start_header_id|>assistant<|end_header_id|>\\n\\n'}}{%endif%}",
)

_CHATML_WITH_BOS_MARKS = replace(CHATML_MARKS, bos=True)
# The template that several publishers of Vicuna's descendants use: FastChat's text, with stripped
# turns and a space after each answer, and without BOS.
_SPACED_VICUNA_MARKS = replace(
    VICUNA_MARKS,
    bos=False,
    strip=Strip.TURNS,
    after_answer=(*VICUNA_MARKS.after_answer, " "),
)
# The first templates of Mistral 0.1 and 0.2, which refuse a system message; it is put where the
# present ones put it.
_OLD_MISTRAL_MARKS = replace(MISTRAL_MARKS, before_user=("[INST] ",), before_answer="")
_OLD_MISTRAL_SPACED_MARKS = replace(_OLD_MISTRAL_MARKS, after_answer=(Control("</s>"), " "))

PUBLISHED_TEMPLATES = (
    PublishedTemplate(FORMATS["llama2"], _LLAMA2),
    PublishedTemplate(FORMATS["llama3"], _LLAMA3),
    PublishedTemplate(FORMATS["chatml"], _pattern(*_CHATML, default=_CHATML_DEFAULT), CHATML_MARKS),
    PublishedTemplate(
        marked("chatml", _CHATML_WITH_BOS_MARKS),
        _pattern("{{bos_token}}", *_CHATML, default=_CHATML_DEFAULT),
        _CHATML_WITH_BOS_MARKS,
    ),
    PublishedTemplate(FORMATS["zephyr"], _ZEPHYR),
    PublishedTemplate(
        marked("vicuna", _SPACED_VICUNA_MARKS, special_tags=VICUNA_TAGS),
        _VICUNA,
        _SPACED_VICUNA_MARKS,
    ),
    PublishedTemplate(FORMATS["mistral"], _MISTRAL),
    PublishedTemplate(
        marked("mistral", _OLD_MISTRAL_MARKS, special_tags=MISTRAL_TAGS),
        _pattern(*_OLD_MISTRAL, space=""),
    ),
    PublishedTemplate(
        marked("mistral", _OLD_MISTRAL_SPACED_MARKS, special_tags=MISTRAL_TAGS),
        _pattern(*_OLD_MISTRAL, space=r"\+' '"),
    ),
    PublishedTemplate(FORMATS["llama3.1"], _LLAMA31),
    PublishedTemplate(FORMATS["mistral-v3"], _pattern(*_MISTRAL_V3, trim=r"\|trim")),
    PublishedTemplate(
        marked("mistral-v3", replace(MISTRAL_V3_MARKS, strip=Strip.NONE)),
        _pattern(*_MISTRAL_V3, trim=""),
    ),
)
# In a template of Llama Guard. The categories in the prompt are Chasqui's, whatever these are.
LLAMA_GUARD_PARTS = (
    "[INST] Task: Check if there is unsafe content in",
    "<BEGIN UNSAFE CONTENT CATEGORIES>",
    "<BEGIN CONVERSATION>",
)
