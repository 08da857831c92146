"""A conversation in the terminal or over pipes: answers go to stdout, all else to stderr.

The dialog lives here and is sent with every question; the services remember nothing.
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

from chasqui.cli.wrapping import WordWrap
from client.errors import ChasquiError
from client.requests import ChatOptions, Message
from client.results import Delta, Event, Finished, FinishReason, Started, Token
from client.sync import Client
from llama.prompt_format.tags import SPECIAL_TAGS, special_tags, without_special_tags

HELP = """\
/system TEXT  give the model instructions; without TEXT, take them back
/reset        forget the conversation, keep the instructions
/logprobs     show the tokens of each answer with their probabilities, or stop that
/save FILE    write the conversation to FILE as JSON
/help         show this
/quit         leave; so do Ctrl-D, and Ctrl-C while nothing is being answered
Ctrl-C        stop the running answer"""

_ENDINGS = {
    FinishReason.LENGTH: "cut off: the answer reached its length limit",
    FinishReason.CONTEXT_LENGTH: "cut off: dialog and answer fill the context",
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
        # Pairs of messages at the beginning that fit the context no more and are not sent again.
        self._dropped_turns = 0
        # The model's, as its last answer told them.
        self._special_tags = SPECIAL_TAGS

    def run(self) -> None:
        """Answers what comes in, line by line, until the end of the input."""
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
                raise  # nothing shows answers any more
            except (ChasquiError, OSError) as error:
                if not interactive:
                    raise
                _say(f"Error: {error}")

    def ask(self, question: str) -> None:
        """Prints the answer while it is made. Ctrl-C ends it; what there is of it stays."""
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
        _note_ending(finish_reason, categories)
        if self._options.get("logprobs"):
            _show([token for delta in deltas for token in delta.tokens])
        answer = "".join(delta.text for delta in deltas)
        if not answer and finish_reason is FinishReason.STOP:
            _say("(the answer is empty)")
        # A refused question would have every later one refused, too, and a turn needs an answer.
        if finish_reason is FinishReason.SPECIAL_TAGS:
            _note_refusal(special_tags(question, self._special_tags))
        elif answer and finish_reason is not FinishReason.SAFETY:
            self._keep(user, answer)

    def ask_for_choices(self, question: str, n: int) -> None:
        """Prints `n` answers; the conversation does not go on from any of them."""
        user: Message = {"role": "user", "content": question}
        dialog = [*self._dialog(first_turn=self._dropped_turns), user]
        with closing(self._client.chat_stream(dialog, n=n, **self._options)) as stream:
            _note_refusal(special_tags(question, print_choices(stream, n)))

    def _keep(self, user: Message, answer: str) -> None:
        kept = without_special_tags(answer, self._special_tags)
        if tags := special_tags(answer, self._special_tags):
            left_out = "the tags" if kept.strip() else "this turn"
            _say(
                f"(the answer holds {' and '.join(tags)}, which no dialog may hold: the "
                f"conversation goes on without {left_out})"
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
            _say(f"(the oldest {self._dropped_turns} {turns} not fit the context any more)")

    def _obey(self, text: str) -> None:
        command, _, argument = text.partition(" ")
        match command:
            case "/system" if argument and (tags := refused_tags(self._client, argument)):
                _say(f"instructions must not hold {' or '.join(tags)}: they are as before")
            case "/system":
                self._system = argument.strip() or None
                _say("instructions set" if self._system else "instructions taken back")
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
                _say(f"there is no {command}; /help lists the commands")

    def _save(self, path: Path) -> None:
        dialog = json.dumps(self._dialog(), ensure_ascii=False, indent=2)
        path.write_text(f"{dialog}\n", encoding="utf-8")
        _say(f"saved to {path}")


def printed(stream: Iterator[Event]) -> Iterator[Event]:
    """Passes the events on and prints their text, with a line's end also where the stream fails."""
    at_line_start, form = True, _form()
    try:
        for event in stream:
            if isinstance(event, Delta):
                click.echo(form(event.text), nl=False)
                at_line_start = event.text.endswith("\n")
            elif not at_line_start:
                click.echo()
                at_line_start = True
            yield event
    finally:
        if not at_line_start:
            click.echo()


def _form() -> Callable[[str], str]:
    """How text is shown that begins on a new line: broken between words, if on a terminal."""
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
                _note_ending(event.finish_reason, event.safety_categories)
    return tags


def refused_tags(client: Client, text: str) -> tuple[str, ...]:
    """The tags in a text that no dialog with the served model may hold."""
    return special_tags(text, client.get_model().special_tags)


def _note_ending(reason: FinishReason, categories: Sequence[str]) -> None:
    """Says why an answer ended, where that is not plain to see, and what a classifier found."""
    if reason in _ENDINGS:
        found = f": {', '.join(categories)}" if categories else ""
        _say(f"({_ENDINGS[reason]}{found})")


def _note_refusal(tags: Sequence[str]) -> None:
    if tags:
        _say(
            f"(the question holds {' and '.join(tags)}, which no dialog may hold: it was not "
            "answered, and the conversation goes on without it)"
        )


def in_turn(stream: Iterator[Event]) -> Iterator[Event]:
    """The events of one dialog's answers, answer by answer; the first answer's never wait."""
    waiting: defaultdict[int, deque[Event]] = defaultdict(deque)
    turn = 0
    for arrived in stream:
        waiting[arrived.choice_index].append(arrived)
        while waiting[turn]:
            event = waiting[turn].popleft()
            yield event
            turn += isinstance(event, Finished)


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):  # editing and history for input(); not every Python has it
        importlib.import_module("readline")
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()  # the shell's prompt belongs on a line of its own


def _show(tokens: Sequence[Token]) -> None:
    for token in tokens:
        text = token.bytes.decode(errors="backslashreplace")
        click.echo(f"{token.logprob:9.4f} {exp(token.logprob):7.1%}  {text!r}")


def _say(text: str) -> None:
    click.secho(text, err=True, dim=True)
