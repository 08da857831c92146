"""The calls that need the tokenizer and no model: RenderPrompt, Tokenize and Detokenize.

Encoding and decoding are work, too, so each call counts as one generation in the queue meanwhile.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from gateway.request.options import RequestLimits, answer_room, default_max_gen_len
from gateway.request.prompts import encode_dialogs
from gateway.request.read_dialogs import Dialogs, read_dialog, read_dialogs
from gateway.request.turn_dropper import Encode
from gateway.request.validation import context_policy_violations
from gateway.request.window import Window
from gateway.text.detokenizer import Detokenizer
from gateway.text.token_bytes import TokenBytes
from gateway.text.vocabulary import Vocabulary
from llama.prompt_format.dialog import Segment, drop_oldest_turns
from llama.prompt_format.formats import PromptFormat
from llama.v1 import chat_pb2
from serving.errors import RequestError, Violation, invalid_argument, resource_exhausted
from serving.intake.time_slice import TimeSlice
from serving.request_rules import count_violations, token_id_problem

# The most bytes of a text or a dialog that Tokenize takes: what the tokenizer service encodes at
# once for all callers.
MAX_TEXT_BYTES = 1024 * 1024
# Ids from one look at the clock to the next.
_IDS_PER_CHECK = 1024


@dataclass(frozen=True, slots=True)
class TokenizerTools:
    """The tokenizer of the served model, and the limits of a call."""

    vocabulary: Vocabulary
    prompt_format: PromptFormat
    window: Window
    encode: Encode
    limits: RequestLimits
    max_response_bytes: int
    # Holds a place in the queue until the `with` block ends.
    admit: Callable[[], AbstractContextManager[object]]

    def require_size(self, size: int) -> None:
        """RESOURCE_EXHAUSTED if a response has more bytes than a unary one may have."""
        if size > self.max_response_bytes:
            raise _too_large(self.max_response_bytes)


async def render_prompt(
    request: chat_pb2.RenderPromptRequest, tools: TokenizerTools
) -> chat_pb2.RenderPromptResponse:
    """The prompt of a dialog."""
    window, read, max_gen_len = tools.window, Dialogs(), default_max_gen_len(tools.window.length)
    if request.HasField("max_gen_len"):
        max_gen_len = request.max_gen_len
    read_dialog("dialog", request.dialog, tools.limits, tools.prompt_format, into=read)
    _refuse([*read.violations, *context_policy_violations(request.context_policy)])
    with tools.admit():
        [prompt] = await encode_dialogs(
            read.messages,
            tools.encode,
            window,
            answer_room=answer_room(request.context_policy, window, max_gen_len),
            prompt_format=tools.prompt_format,
        )
    kept = drop_oldest_turns(read.messages["dialog"], prompt.dropped_turns)
    return chat_pb2.RenderPromptResponse(
        ids=prompt.ids,
        segments=[
            segment.control_token + segment.text
            for segment in itertools.chain.from_iterable(tools.prompt_format.render(kept))
        ],
        prompt_tokens=len(prompt.ids),
        remaining_tokens=window.length - len(prompt.ids),
        dropped_turns=prompt.dropped_turns,
        has_special_tags=bool(read.unsafe),
    )


async def tokenize(
    request: chat_pb2.TokenizeRequest, tools: TokenizerTools
) -> chat_pb2.TokenizeResponse:
    """The tokens of texts or dialogs."""
    texts, wants_tokens, read = [*request.texts], request.tokens, Dialogs()
    if request.dialogs:
        read = await read_dialogs(request.dialogs, tools.limits, tools.prompt_format)
    _refuse([*read.violations, *_texts_violations(request, tools.limits), *_size_violations(read)])
    bos, eos = request.bos or not request.HasField("bos"), request.eos
    del request
    with tools.admit():
        if texts:
            sequences = await tools.encode([Segment(text, bos=bos, eos=eos) for text in texts])
        else:
            window = replace(tools.window, length=sys.maxsize)
            prompts = await encode_dialogs(
                read.messages, tools.encode, window, prompt_format=tools.prompt_format
            )
            sequences = [prompt.ids for prompt in prompts]
        response, size = chat_pb2.TokenizeResponse(), 0
        for ids in sequences:
            tokenization = response.tokenizations.add(ids=ids)
            size += tokenization.ByteSize()
            tools.require_size(size)
            if wants_tokens:
                size += await _add_tokens(tokenization, tools, size)
    return response


async def detokenize(
    request: chat_pb2.DetokenizeRequest, tools: TokenizerTools
) -> chat_pb2.DetokenizeResponse:
    """The texts of sequences of token ids."""
    _refuse(count_violations("sequences", len(request.sequences), tools.limits.max_dialogs))
    _refuse(await _ids_violations(request, len(tools.vocabulary)))
    response, size, time_slice = chat_pb2.DetokenizeResponse(), 0, TimeSlice()
    with tools.admit():
        for sequence in request.sequences:
            detokenizer, token_bytes = Detokenizer(tools.vocabulary), TokenBytes(tools.vocabulary)
            texts: list[str] = []
            parts: list[bytes] = []
            for ids in _chunks(sequence.ids):
                texts.append("".join(map(detokenizer.push, ids)))
                parts.append(b"".join(map(token_bytes.push, ids)))
                size += len(parts[-1]) + len(texts[-1].encode())
                tools.require_size(size)
                await time_slice.yield_if_over()
            text = "".join(texts) + detokenizer.finish()
            response.texts.add(text=text, bytes=b"".join(parts))
    tools.require_size(response.ByteSize())
    return response


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise invalid_argument(violations)


def _texts_violations(request: chat_pb2.TokenizeRequest, limits: RequestLimits) -> list[Violation]:
    if request.dialogs:
        given = {"texts": request.texts, "bos": request.HasField("bos"), "eos": request.eos}
        rule = "cannot be given together with dialogs"
        return [Violation(name, rule) for name, value in given.items() if value]
    found = count_violations("texts", len(request.texts), limits.max_dialogs)
    return found or [
        Violation(f"texts[{index}]", _too_many_bytes(size))
        for index, text in enumerate(request.texts)
        if (size := len(text.encode())) > MAX_TEXT_BYTES
    ]


def _size_violations(read: Dialogs) -> list[Violation]:
    return [
        Violation(path, _too_many_bytes(size))
        for path, messages in read.messages.items()
        if (size := sum(len(each.content.encode()) for each in messages)) > MAX_TEXT_BYTES
    ]


def _too_many_bytes(size: int) -> str:
    return f"must have at most {MAX_TEXT_BYTES} bytes, not {size}: tokenize it in parts"


async def _ids_violations(request: chat_pb2.DetokenizeRequest, vocab_size: int) -> list[Violation]:
    """The first invalid id of each sequence, found in steps that let other tasks run."""
    found, time_slice = [], TimeSlice()
    for index, sequence in enumerate(request.sequences):
        begin = 0
        for ids in _chunks(sequence.ids):
            if max(ids) >= vocab_size:
                position = next(i for i, each in enumerate(ids) if each >= vocab_size)
                problem = token_id_problem(ids[position], vocab_size)
                path = f"sequences[{index}].ids[{begin + position}]"
                found.append(Violation(path, problem or ""))
                break
            begin += len(ids)
            await time_slice.yield_if_over()
    return found


def _chunks(ids: Sequence[int]) -> Iterator[list[int]]:
    for begin in range(0, len(ids), _IDS_PER_CHECK):
        yield [*ids[begin : begin + _IDS_PER_CHECK]]


async def _add_tokens(tokenization: chat_pb2.Tokenization, tools: TokenizerTools, size: int) -> int:
    """Adds the tokens of the ids; returns their bytes, which with `size` must not be too many."""
    vocabulary, token_bytes = tools.vocabulary, TokenBytes(tools.vocabulary)
    offset, added, time_slice = 0, 0, TimeSlice()
    for token_id in tokenization.ids:
        token = tokenization.tokens.add(
            id=token_id,
            text=vocabulary.lone_texts[token_id],
            bytes=vocabulary.pieces[token_id],
            offset=offset,
        )
        offset += len(token_bytes.push(token_id))
        added += token.ByteSize() + 2
        tools.require_size(size + added)
        await time_slice.yield_if_over()
    return added


def _too_large(max_bytes: int) -> RequestError:
    message = (
        f"the answer has more than {max_bytes} bytes, the limit of a unary answer: give fewer or "
        "shorter texts or sequences, or leave out `tokens`"
    )
    return resource_exhausted(message, "max_response_bytes", retry_after=None)
