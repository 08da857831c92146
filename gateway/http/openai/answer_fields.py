"""The bodies of answers, field by field, for the OpenAPI document. The tests compare what is sent
with them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "content_filter"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Answer):
    cached_tokens: int


class Usage(_Answer):
    prompt_tokens: Annotated[int, Field(description="of each prompt once, whatever n is")]
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(_Answer):
    token: str
    logprob: Annotated[float, Field(description="natural logarithm; -9999 for impossible tokens")]
    bytes: list[int]


class Token(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    content: list[Token]
    refusal: None


class ChatAnswer(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Head(_Answer):
    id: str
    created: Annotated[int, Field(description="seconds since 1970")]
    model: str
    system_fingerprint: Annotated[
        str, Field(description="of weights, shards, types and kernels: the condition of a replay")
    ]


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: Annotated[
        list[float | None], Field(description="null for a prompt's first, which nothing predicts")
    ]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Answer):
    text: str
    index: int
    logprobs: TextLogprobs | None
    finish_reason: Annotated[FinishReason | None, Field(description="null in chunks but the last")]


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class Tokenization(_Answer):
    count: int
    max_model_len: Annotated[int, Field(description="of the model; no limit of what is tokenized")]
    tokens: Annotated[list[int], Field(description="token ids, those of control tokens included")]
    token_strs: Annotated[list[str] | None, Field(description="with return_token_strs")]


class Detokenization(_Answer):
    prompt: Annotated[str, Field(description="without control tokens")]


class TokenizerInfo(_Answer):
    tokenizer_class: Annotated[
        str, Field(description="the class of transformers that reads such a vocabulary")
    ]
    add_bos_token: bool
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: Annotated[str | None, Field(description="that of the model's files, if any")]


class ScoredAlternative(_Answer):
    id: int
    text: Annotated[str, Field(description="as the tokenizer decodes it alone")]
    bytes: Annotated[list[int], Field(description="exact where the text is not")]
    logprob: Annotated[float, Field(description="natural logarithm; -9999 for impossible tokens")]


class ScoredToken(ScoredAlternative):
    rank: Annotated[int, Field(description="among all tokens by their logprobs, from 1")]
    top_logprobs: list[ScoredAlternative]
    requested_logprobs: Annotated[
        list[ScoredAlternative], Field(description="those of logprob_token_ids")
    ]


class CandidateScore(_Answer):
    index: int
    tokens: list[ScoredToken]
    logprob: Annotated[float, Field(description="the sum of those of its tokens")]
    is_greedy: Annotated[bool, Field(description="each of its tokens is the most probable one")]
    usage: Annotated[Usage, Field(description="of the prompt and the candidate together")]


class Score(_Answer):
    id: str
    object: Literal["score"]
    created: Annotated[int, Field(description="seconds since 1970")]
    model: str
    scores: Annotated[list[CandidateScore], Field(description="in the order of the candidates")]
    fingerprint: Annotated[str, Field(description="of weights, shards, types and kernels")]
    determinism: Literal["unspecified", "seeded", "batch_invariant"]


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[int, Field(description="tokens of a prompt and its answer together")]
    max_choices: Annotated[int, Field(description="answers to one dialog or prompt, the field n")]
    default_sampling: Annotated[
        dict[str, float | bool], Field(description="the values of absent sampling fields")
    ]
    special_tags: Annotated[
        list[str],
        Field(description="a dialog with one of these texts in a message is refused"),
    ]


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class Version(_Answer):
    version: str


class Health(_Answer):
    status: Literal["serving"]


class Problem(_Answer):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: Annotated[str | None, Field(description="the first wrong field")]
    code: str | None


class Error(_Answer):
    error: Problem
