"""The prompt formats: for each, how a dialog becomes the segments of its prompt.

A format's prompt has the ids that the published chat template of its models gives, through
`apply_chat_template` of Hugging Face's transformers. A template itself is a program in Jinja's
language. It is not run here, because it comes with a downloaded file.

All formats take the same dialogs (`llama.prompt_format.dialog.violations`). A mark that is a
control token needs no rule for the messages: text never becomes its id. A mark that is plain text
could be written by a user, too, so it is a special tag, and a dialog that holds one gets Meta's
refusal.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from llama.prompt_format import llama_guard
from llama.prompt_format.dialog import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    Segment,
    Turn,
    drop_oldest_turns,
    has_special_tags,
    render_turn,
    turns,
)
from llama.prompt_format.marks import Control, MarkedTurns, Strip, SystemPlace
from llama.prompt_format.tags import B_INST, E_INST, SPECIAL_TAGS

# The segments of one turn.
TurnSegments = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One prompt format."""

    name: str
    # The segments of each turn, or one entry for the whole dialog where it is a single text.
    write: Callable[[Iterable[Turn]], list[TurnSegments]]
    control_tokens: tuple[str, ...] = ()  # those that the vocabulary must have
    answer_ends: tuple[str, ...] = ()  # control tokens that end an answer, beside the model's EOS
    special_tags: tuple[str, ...] = ()  # texts that no message may hold
    before_answer: str = ""  # between the text of a prompt and that of its answer

    def render(self, dialog: Sequence[Message]) -> list[TurnSegments]:
        """The segments of a valid dialog, by turns. Only the first depends on which came before."""
        return self.write(turns(dialog))

    def first_turn(self, dialog: Sequence[Message], dropped_turns: int) -> TurnSegments:
        """The first turn's segments after so many of the oldest turns are dropped."""
        kept = drop_oldest_turns(dialog, dropped_turns)
        return self.render(kept[: 2 + (kept[0].role == SYSTEM)])[0]

    def has_special_tags(self, dialog: Sequence[Message]) -> bool:
        """Whether a message of the dialog could pass for part of the format."""
        return has_special_tags(dialog, self.special_tags)


def each_turn(
    write_turn: Callable[[Turn], TurnSegments],
) -> Callable[[Iterable[Turn]], list[TurnSegments]]:
    """Writes the turns of a dialog one by one."""
    return lambda dialog: [*map(write_turn, dialog)]


def marked(name: str, marks: MarkedTurns, *, special_tags: tuple[str, ...] = ()) -> PromptFormat:
    """The format with these marks. The token after an answer ends it."""
    written = (
        *marks.begin,
        *marks.before_system,
        *marks.after_system,
        *marks.before_user,
        *marks.after_user,
        *marks.after_answer,
    )
    needed = dict.fromkeys(str(mark) for mark in written if isinstance(mark, Control))
    return PromptFormat(
        name,
        each_turn(marks),
        control_tokens=(*needed,),
        answer_ends=(str(marks.after_answer[0]),),
        special_tags=special_tags,
        before_answer=marks.before_answer,
    )


_HEADER, _HEADER_END = Control("<|start_header_id|>"), Control("<|end_header_id|>")
_EOT = Control("<|eot_id|>")
_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")
_BOS, _EOS = Control("<s>"), Control("</s>")

# Llama 3 Instruct, as Meta's llama3 repository and the template of its models write it.
LLAMA3_MARKS = MarkedTurns(
    begin=(Control("<|begin_of_text|>"),),
    before_system=(_HEADER, "system", _HEADER_END, "\n\n"),
    after_system=(_EOT,),
    before_user=(_HEADER, "user", _HEADER_END, "\n\n"),
    after_user=(_EOT, _HEADER, "assistant", _HEADER_END, "\n\n"),
    after_answer=(_EOT,),
    strip=Strip.ALL,
)
# Llama 3.1, 3.2 and 3.3 Instruct always have a system message, which begins with two dates. The
# second is that of the template of 3.1 and 3.3. The template of 3.2 writes the day on which it runs
# and has the same date for a renderer without a clock; here, too, a prompt is the same each day, so
# that answers can be repeated and cached.
LLAMA31_MARKS = replace(
    LLAMA3_MARKS,
    before_system=(
        *LLAMA3_MARKS.before_system,
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    ),
    default_system="",
)
# ChatML, as OpenAI described it.
CHATML_MARKS = MarkedTurns(
    before_system=(_IM_START, "system\n"),
    after_system=(_IM_END, "\n"),
    before_user=(_IM_START, "user\n"),
    after_user=(_IM_END, "\n", _IM_START, "assistant\n"),
    after_answer=(_IM_END, "\n"),
)
# Zephyr and TinyLlama Chat. Their template has no BOS.
ZEPHYR_MARKS = MarkedTurns(
    before_system=("<|system|>\n",),
    after_system=(_EOS, "\n"),
    before_user=("<|user|>\n",),
    after_user=(_EOS, "\n<|assistant|>\n"),
    after_answer=(_EOS, "\n"),
)
# Vicuna 1.1 to 1.5, as FastChat writes it (`vicuna_v1.1` in its conversation.py); the models come
# without a template.
VICUNA_MARKS = MarkedTurns(
    bos=True,
    after_system=(" ",),
    before_user=("USER: ",),
    after_user=(" ASSISTANT:",),
    before_answer=" ",
    after_answer=(_EOS,),
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    ),
)
# Mistral Instruct 0.1 and 0.2. The models know no system message; their template puts it in front
# of the first user's.
MISTRAL_MARKS = MarkedTurns(
    begin=(_BOS,),
    before_user=(" [INST] ",),
    after_user=(" [/INST]",),
    before_answer=" ",
    after_answer=(_EOS,),
    system_place=SystemPlace.FIRST_USER,
)
# Mistral Instruct 0.3, whose instruction marks are control tokens. Its template puts the system
# message in front of the last user's message.
MISTRAL_V3_MARKS = replace(
    MISTRAL_MARKS,
    before_user=(Control(B_INST), " "),
    after_user=(Control(E_INST),),
    system_place=SystemPlace.LAST_USER,
    strip=Strip.ANSWERS,
)

MISTRAL_TAGS = (B_INST, E_INST)
ZEPHYR_TAGS = ("<|system|>", "<|user|>", "<|assistant|>")
VICUNA_TAGS = ("USER:", "ASSISTANT:")


def _judgement(dialog: Iterable[Turn]) -> list[TurnSegments]:
    """The one text of Llama Guard's prompt; Llama Guard knows no system message."""
    messages = []
    for turn in dialog:
        messages.append(Message(USER, turn.user))
        if turn.answer is not None:
            messages.append(Message(ASSISTANT, turn.answer))
    prompt = llama_guard.render(llama_guard.default_policy(), messages)
    return [(Segment(prompt, bos=True),)]


LLAMA2 = PromptFormat(
    "llama2", each_turn(render_turn), special_tags=SPECIAL_TAGS, before_answer=" "
)
# Llama Guard 1 as a chat model: the prompt asks for a judgement of the last user's message. It is
# one text, so no turn can be dropped from it; tags in it are replaced and need no refusal.
LLAMA_GUARD = PromptFormat("llama-guard", _judgement, before_answer=" ")

FORMATS = {
    each.name: each
    for each in (
        LLAMA2,
        marked("llama3", LLAMA3_MARKS),
        marked("llama3.1", LLAMA31_MARKS),
        marked("chatml", CHATML_MARKS),
        marked("zephyr", ZEPHYR_MARKS, special_tags=ZEPHYR_TAGS),
        marked("vicuna", VICUNA_MARKS, special_tags=VICUNA_TAGS),
        marked("mistral", MISTRAL_MARKS, special_tags=MISTRAL_TAGS),
        marked("mistral-v3", MISTRAL_V3_MARKS),
        LLAMA_GUARD,
    )
}
