"""A conversation in the terminal or over pipes: answers go to stdout, everything else to stderr.

The dialog is kept here and sent with every question; the services keep no conversations.
"""

import importlib
import json
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from math import exp
from pathlib import Path

import click

from chasqui.cli.client_warnings import client_warnings
from chasqui.cli.wrapping import WordWrap
from chasqui.flags import with_advice
from client.errors import ChasquiError
from client.requests import ChatOptions, Message
from client.results import Delta, Event, Finished, FinishReason, Started, Token
from client.sync import Client
from llama.prompt_format.tags import SPECIAL_TAGS, special_tags, without_special_tags

HELP = """\
/system TEXT  give the model instructions; without TEXT, remove them
/reset        forget the conversation, keep the instructions
/logprobs     turn on or off: show the tokens of each answer with their probabilities
/save FILE    write the conversation to FILE as JSON
/help         show this list
/quit         end the chat, like Ctrl-D, or Ctrl-C at the prompt
Ctrl-C        stop the running answer"""

_ENDINGS = {
    FinishReason.LENGTH: "cut off: the answer reached its length limit",
    FinishReason.CONTEXT_LENGTH: "cut off: dialog and answer fill the model's context",
    FinishReason.CANCELLED: "stopped",
    FinishReason.SAFETY: "ended by the safety classifier",
}


class Conversation:
    """One dialog with the model behind `client`."""

    def __init__(self, client: Client, options: ChatOptions, system: str | None = None) -> None:
        self._client = client
        self._options: ChatOptions = {**options, "context_policy": "drop_oldest_turns"}
        self._system = system
        self._turns: list[Message] = []
        # Turns at the beginning that no longer fit the context and are not sent again.
        self._dropped_turns = 0
        # The model's, as its last answer told them.
        self._special_tags = SPECIAL_TAGS

    def run(self) -> None:
        """Answers the input line by line until its end."""
        interactive = sys.stdin.isatty()
        for line in _typed_lines() if interactive else sys.stdin:
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._obey(text)
                elif text:
                    self.ask(text)
            except BrokenPipeError:
                raise  # the output is no longer read
            except (ChasquiError, OSError) as error:
                if not interactive:
                    raise
                _say(f"Error: {with_advice(error)}")

    def ask(self, question: str) -> None:
        """Prints the answer as it is generated. Ctrl-C ends it and keeps the part so far."""
        user: Message = {"role": "user", "content": question}
        finish_reason, categories = FinishReason.CANCELLED, tuple[str, ...]()
        deltas: list[Delta] = []
        dialog = self._dialog(first_turn=self._dropped_turns)
        with closing(self._client.chat_stream([*dialog, user], **self._options)) as stream:
            try:
                for event in printed(stream):
                    match event:
                        case Started():
                            self._special_tags = event.special_tags
                            self._drop_turns(event.dropped_turns)
                        case Delta():
                            deltas.append(event)
                        case Finished():
                            finish_reason = event.finish_reason
                            categories = event.safety_categories
            except KeyboardInterrupt:
                pass  # leaving the stream cancels it
        _explain_ending(finish_reason, categories)
        if self._options.get("logprobs"):
            _show([token for delta in deltas for token in delta.tokens])
        answer = "".join(delta.text for delta in deltas)
        if not answer and finish_reason is FinishReason.STOP:
            _say("(the answer is empty)")
        # Kept are only turns with an answer; a refused question would have later ones refused, too.
        if finish_reason is FinishReason.SPECIAL_TAGS:
            _explain_refusal(special_tags(question, self._special_tags))
        elif answer and finish_reason is not FinishReason.SAFETY:
            self._keep(user, answer)

    def ask_for_choices(self, question: str, n: int) -> None:
        """Prints `n` answers; none of them becomes part of the conversation."""
        user: Message = {"role": "user", "content": question}
        dialog = [*self._dialog(first_turn=self._dropped_turns), user]
        with closing(self._client.chat_stream(dialog, n=n, **self._options)) as stream:
            _explain_refusal(special_tags(question, print_choices(stream, n)))

    def _keep(self, user: Message, answer: str) -> None:
        kept = without_special_tags(answer, self._special_tags)
        if tags := special_tags(answer, self._special_tags):
            left_out = "the tags" if kept.strip() else "this turn"
            _say(
                f"(the answer contains {' and '.join(tags)}, which no dialog may contain: the "
                f"conversation continues without {left_out})"
            )
        if kept.strip() or not tags:
            self._turns += [user, {"role": "assistant", "content": kept}]

    def _dialog(self, first_turn: int = 0) -> list[Message]:
        system: list[Message] = []
        if self._system:
            system = [{"role": "system", "content": self._system}]
        return system + self._turns[2 * first_turn :]

    def _drop_turns(self, count: int) -> None:
        if count:
            self._dropped_turns += count
            turns = "turn does" if self._dropped_turns == 1 else "turns do"
            _say(f"(the oldest {self._dropped_turns} {turns} not fit the model's context any more)")

    def _obey(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        match command:
            case "/system" if argument and (tags := refused_tags(self._client, argument)):
                _say(f"instructions must not contain {' or '.join(tags)}: they are unchanged")
            case "/system":
                self._system = argument.strip() or None
                _say("instructions set" if self._system else "instructions removed")
            case "/reset":
                self._turns, self._dropped_turns = [], 0
                _say("conversation forgotten")
            case "/logprobs":
                self._options["logprobs"] = not self._options.get("logprobs", False)
                _say(f"logprobs {'on' if self._options['logprobs'] else 'off'}")
            case "/save" if argument:
                self._save(Path(argument.strip()))
            case "/save":
                _say("/save needs the name of a file")
            case "/help":
                _say(HELP)
            case _:
                _say(f"there is no command {command}; /help lists the commands")

    def _save(self, path: Path) -> None:
        dialog = json.dumps(self._dialog(), ensure_ascii=False, indent=2)
        path.write_text(f"{dialog}\n", encoding="utf-8")
        _say(f"saved to {path}")


def printed(stream: Iterator[Event]) -> Iterator[Event]:
    """Passes the events on and prints their text; ends the line, even if the stream fails."""
    at_line_start, form = True, _form()

    def end_line() -> None:
        nonlocal at_line_start, form
        if not at_line_start:
            click.echo()
            at_line_start, form = True, _form()

    def show_warning(text: str) -> None:
        end_line()
        _say(f"({text})")

    with client_warnings(show_warning):
        try:
            for event in stream:
                if isinstance(event, Delta):
                    click.echo(form(event.text), nl=False)
                    at_line_start = event.text.endswith("\n")
                else:
                    end_line()
                yield event
        finally:
            end_line()


def _form() -> Callable[[str], str]:
    """The formatting of text that begins a line: on a terminal, lines break between words."""
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return str
    terminal = sys.stdout.fileno()
    return WordWrap(lambda: os.get_terminal_size(terminal).columns)


def print_choices(stream: Iterator[Event], n: int) -> tuple[str, ...]:
    """Prints `n` answers to one dialog or prompt, each under a note with its number and seed.

    Returns the special tags of the model.
    """
    tags = SPECIAL_TAGS
    for event in printed(in_turn(stream)):
        match event:
            case Started():
                tags = event.special_tags
                _say(f"(answer {event.choice_index + 1} of {n}, seed {event.seed})")
            case Finished():
                _explain_ending(event.finish_reason, event.safety_categories)
    return tags


def refused_tags(client: Client, text: str) -> tuple[str, ...]:
    """The tags in a text that no dialog with the served model may contain."""
    return special_tags(text, client.get_model().special_tags)


def _explain_ending(reason: FinishReason, categories: Sequence[str]) -> None:
    """Prints why an answer ended early, with the categories of the safety classifier."""
    if reason in _ENDINGS:
        found = f": {', '.join(categories)}" if categories else ""
        _say(f"({_ENDINGS[reason]}{found})")


def _explain_refusal(tags: Sequence[str]) -> None:
    if tags:
        _say(
            f"(the question contains {' and '.join(tags)}, which no dialog may contain: it was not "
            "answered, and the conversation continues without it)"
        )


def in_turn(stream: Iterator[Event]) -> Iterator[Event]:
    """The events of one dialog's answers, sorted by answer; those of the first are not delayed."""
    waiting: defaultdict[int, deque[Event]] = defaultdict(deque)
    turn = 0
    for arrived in stream:
        waiting[arrived.choice_index].append(arrived)
        while waiting[turn]:
            event = waiting[turn].popleft()
            yield event
            turn += isinstance(event, Finished)


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):  # line editing and history for input(), if this Python has it
        importlib.import_module("readline")
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()  # ends the line of the prompt


def _show(tokens: Sequence[Token]) -> None:
    for token in tokens:
        text = token.bytes.decode(errors="backslashreplace")
        click.echo(f"{token.logprob:9.4f} {exp(token.logprob):7.1%}  {text!r}")


def _say(text: str) -> None:
    click.secho(text, err=True, dim=True)
