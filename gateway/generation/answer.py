"""The text of one generation, made from its token ids: detokenized, cut at stop strings, with token
details. Does no input or output, so that it can be tested without a server.
"""

from collections.abc import Sequence

from gateway.generation.events import Delta
from gateway.request.options import Options
from gateway.text.detokenizer import Detokenizer
from gateway.text.stop_strings import StopFilter
from gateway.text.vocabulary import Vocabulary
from llama.v1 import chat_pb2, model_pb2


class Answer:
    """The text of an answer, in whole characters up to the first stop string, and its tokens."""

    def __init__(self, prompt_ids: Sequence[int], options: Options, vocabulary: Vocabulary) -> None:
        self.completion_tokens = 0
        self._prompt_ids = prompt_ids
        self._options = options
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary)
        self._stop = StopFilter(options.stop)
        # The number of prompt ids that the model still reports before the answer's.
        self._expected_prompt_ids = len(prompt_ids) if options.prompt_logprobs else 0

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty if none has."""
        return self._stop.stop_string

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text; later ids are ignored."""
        return self._stop.found

    def begin(self) -> Delta:
        """The prompt's text if `echo` is set, unless it comes with the prompt's tokens.

        With `exact_continuation` the detokenizer reads the prompt first: a space or the last bytes
        of a character at the beginning of the answer depend on it.
        """
        options = self._options
        if options.prompt_logprobs or not (options.echo or options.exact_continuation):
            return Delta("", [])
        text = "".join(map(self._detokenizer.push, self._prompt_ids))
        return Delta(text if options.echo else "", [])

    def append_event(self, event: model_pb2.TokenEvent) -> Delta:
        """Appends the tokens of an event; returns what they add to the answer."""
        text: list[str] = []
        tokens: list[chat_pb2.Token] = []
        for position, token_id in enumerate(event.ids):
            if self.stopped:
                break
            text.append(self._push(token_id))
            if self._options.logprobs:
                tokens.append(self._token(event, position, token_id))
        if event.finish_reason and not self.stopped:
            text.append(self._stop.push(self._detokenizer.finish()))
            text.append(self._stop.finish())
        return Delta("".join(text), tokens, self.completion_tokens)

    def _push(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        if self._expected_prompt_ids:
            self._expected_prompt_ids -= 1
            return text
        self.completion_tokens += 1
        if self.completion_tokens <= self._options.sampling.min_gen_len:
            return text
        return self._stop.push(text)

    def stop_token(self, event: model_pb2.TokenEvent) -> chat_pb2.Token | None:
        """The token that ended the answer with the last event; None if its logprob is unknown."""
        position = len(event.ids)
        known = event.HasField("stop_token_id") and len(event.logprobs) > position
        return self._token(event, position, event.stop_token_id) if known else None

    def _token(self, event: model_pb2.TokenEvent, position: int, token_id: int) -> chat_pb2.Token:
        wanted = self._options.logprob_token_ids
        rank = event.ranks[position] if event.ranks else 0
        # The first token of a prompt has no prediction, so an event may hold no alternatives.
        top = event.top[position] if event.top else model_pb2.TopLogprobs()
        begin = position * len(wanted)
        requested = event.requested_logprobs[begin : begin + len(wanted)] if rank else []
        return chat_pb2.Token(
            id=token_id,
            text=self._vocabulary.lone_texts[token_id],
            bytes=self._vocabulary.pieces[token_id],
            logprob=event.logprobs[position],
            rank=rank,
            top_logprobs=map(self._token_logprob, top.ids, top.logprobs),
            requested_logprobs=map(self._token_logprob, wanted, requested),
        )

    def _token_logprob(self, token_id: int, logprob: float) -> chat_pb2.TokenLogprob:
        return chat_pb2.TokenLogprob(
            id=token_id,
            text=self._vocabulary.lone_texts[token_id],
            bytes=self._vocabulary.pieces[token_id],
            logprob=logprob,
        )
