"""The endpoints of the HTTP port beside OpenAI's: the same numbers and refusals as by gRPC."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx2
import pytest

from gateway.http.openai import answer_fields
from gateway.request.tokenization import MAX_TEXT_BYTES
from llama.v1.chat_pb2 import (
    DetokenizeRequest,
    Dialog,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
)
from llama.v1.sampling_pb2 import TokenIds
from tests.gateway.conftest import RunningGateway, ScriptedModel
from tests.gateway.messages import dialog, ids_of
from tests.gateway.test_score_calls import tell_scores
from tokenizer_service.tokenizer import Tokenizer

TEXT = "Hi naïve 🦙 <s>!"
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


TOKENIZED: list[tuple[dict[str, Any], TokenizeRequest]] = [
    ({"prompt": TEXT}, TokenizeRequest(texts=[TEXT], tokens=True)),
    (
        {"prompt": "", "add_special_tokens": False},
        TokenizeRequest(texts=[""], bos=False, tokens=True),
    ),
    (
        {"messages": USER, "add_special_tokens": False, "add_generation_prompt": True},
        TokenizeRequest(dialogs=[dialog("Hello")], tokens=True),
    ),
]


async def test_tokens_are_those_of_grpc(gateway: RunningGateway, http: Any) -> None:
    for body, request in TOKENIZED:
        [expected] = (await gateway.stub.Tokenize(request)).tokenizations
        answered = await http.post("/tokenize", json=body | {"return_token_strs": True})
        found = answer_fields.Tokenization.model_validate_json(answered.content)
        assert (found.tokens, found.count) == ([*expected.ids], len(expected.ids))
        assert found.max_model_len == 256
        named = ["<s>" if token.id == 1 else token.text for token in expected.tokens]
        assert found.token_strs == named
        plain = await http.post("/tokenize", json=body)
        assert plain.json() == answered.json() | {"token_strs": None}


async def test_texts_of_ids_are_those_of_grpc(gateway: RunningGateway, http: Any) -> None:
    [found] = (await gateway.stub.Tokenize(TokenizeRequest(texts=[TEXT]))).tokenizations
    for ids in ([*found.ids], [*found.ids][:-4], []):
        request = DetokenizeRequest(sequences=[TokenIds(ids=ids)])
        [expected] = (await gateway.stub.Detokenize(request)).texts
        answered = await http.post("/detokenize", json={"model": "scripted", "tokens": ids})
        found_text = answer_fields.Detokenization.model_validate_json(answered.content)
        assert found_text.prompt == expected.text


async def test_tokenizer_is_described_by_its_files(http: Any, tokenizer: Tokenizer) -> None:
    info = answer_fields.TokenizerInfo.model_validate_json(
        (await http.get("/tokenizer_info")).content
    )
    assert (info.bos_token, info.eos_token, info.add_bos_token) == ("<s>", "</s>", True)
    assert (info.vocab_size, info.model_max_length) == (tokenizer.n_words, 256)
    assert (info.tokenizer_class, info.chat_template) == ("LlamaTokenizer", None)


TEXTS: dict[str, Any] = {"prompt": "The llama walks over", "candidates": [" the bridge", " a road"]}
SCORED: list[tuple[dict[str, Any], ScoreRequest]] = [
    (TEXTS, ScoreRequest(**TEXTS)),
    (
        {"prompt_ids": [1, 300], "candidate_ids": [[301, 302], [7]]},
        ScoreRequest(prompt_ids=ids_of(1, 300), candidate_ids=[ids_of(301, 302), ids_of(7)]),
    ),
    (
        {"messages": USER, "candidates": ["Hi", "Bye"]},
        ScoreRequest(dialog=dialog("Hello"), candidates=["Hi", "Bye"]),
    ),
]
OPTIONS: dict[str, Any] = {"top_logprobs": 2, "logprob_token_ids": [9], "priority": 3}


async def scored(call: Any, model: ScriptedModel) -> Any:
    """The answer to a request for two candidates."""
    running = asyncio.ensure_future(call)
    for _ in range(2):
        start = await model.starts.get()
        assert (start.priority, [*start.logprob_token_ids]) == (3, [9])
        tell_scores(model, start, first_rank=2)
    return await running


def said(tokens: Any) -> list[Any]:
    """Tokens of either protocol, and their alternatives."""
    return [
        (
            *(token.id, token.text, bytes(token.bytes), token.logprob, token.rank),
            *((each.id, each.logprob) for each in token.top_logprobs),
        )
        for token in tokens
    ]


async def test_scores_are_those_of_grpc(
    gateway: RunningGateway, http: Any, model: ScriptedModel
) -> None:
    for body, request in SCORED:
        request.MergeFrom(ScoreRequest(**OPTIONS))
        expected: ScoreResponse = await scored(gateway.stub.Score(request), model)
        answered = await scored(http.post("/v1/score", json=body | OPTIONS), model)
        found = answer_fields.Score.model_validate_json(answered.content)
        assert (found.model, found.fingerprint) == (expected.model, expected.fingerprint)
        assert found.determinism == "seeded"
        for mine, theirs in zip(found.scores, expected.scores, strict=True):
            assert (mine.index, mine.is_greedy) == (theirs.index, theirs.is_greedy)
            assert mine.logprob == theirs.logprob < 0
            assert mine.usage.total_tokens == theirs.usage.prompt_tokens
            assert said(mine.tokens) == said(theirs.tokens)


LONG = "b" * (MAX_TEXT_BYTES + 1)
# Bodies with the request that gRPC refuses for the same reason, and the first wrong field of each.
REFUSED: list[tuple[str, dict[str, Any], Any, str, str]] = [
    (
        "/tokenize",
        {"prompt": "a", "messages": USER},
        TokenizeRequest(texts=["a"], dialogs=[dialog("Hello")]),
        "prompt",
        "texts",
    ),
    (
        "/tokenize",
        {"messages": USER, "add_special_tokens": True},
        TokenizeRequest(dialogs=[dialog("Hello")], bos=True),
        "add_special_tokens",
        "bos",
    ),
    ("/tokenize", {"prompt": LONG}, TokenizeRequest(texts=[LONG]), "prompt", "texts[0]"),
    (
        "/tokenize",
        {"messages": []},
        TokenizeRequest(dialogs=[Dialog()]),
        "messages",
        "dialogs[0].messages",
    ),
    (
        "/detokenize",
        {"tokens": [1, 560]},
        DetokenizeRequest(sequences=[TokenIds(ids=[1, 560])]),
        "tokens[1]",
        "sequences[0].ids[1]",
    ),
    (
        "/v1/score",
        {"prompt": "a"},
        ScoreRequest(prompt="a"),
        "candidates",
        "candidates",
    ),
    (
        "/v1/score",
        {"candidates": ["a"]},
        ScoreRequest(candidates=["a"]),
        "prompt",
        "prompt",
    ),
    (
        "/v1/score",
        {"prompt_ids": [1], "candidate_ids": [[5], [7, 560]]},
        ScoreRequest(prompt_ids=ids_of(1), candidate_ids=[ids_of(5), ids_of(7, 560)]),
        "candidate_ids[1][1]",
        "candidate_ids[1].ids[1]",
    ),
    (
        "/v1/score",
        {"messages": [], "candidates": ["a"]},
        ScoreRequest(dialog=Dialog(), candidates=["a"]),
        "messages",
        "dialog.messages",
    ),
    (
        "/tokenize",
        {"model": "other", "prompt": "a"},
        TokenizeRequest(model="other", texts=["a"]),
        "model",
        "model",
    ),
]


async def test_refusals_are_those_of_grpc_in_the_names_of_the_body(
    gateway: RunningGateway, http: Any
) -> None:
    for path, body, request, field, grpc_field in REFUSED:
        method = getattr(gateway.stub, type(request).__name__.removesuffix("Request"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request)
        answered = await http.post(path, json=body)
        error = answer_fields.Error.model_validate_json(answered.content).error
        assert error.param == field
        not_found = refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert answered.status_code == (404 if not_found else 400)
        first, *_ = str(refused.value.details()).split("; ")
        rule = re.sub(r"\bdialogs?\b", "messages", first.removeprefix(f"{grpc_field}: "))
        assert error.message.split("; ")[0] == f"{field}: {rule}"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"messages": USER, "add_generation_prompt": False}, "add_generation_prompt"),
    ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ("/v1/score", {"prompt": "", "prompt_ids": [1], "candidates": ["a"]}, "prompt_ids"),
]


async def test_wrong_bodies_are_refused_by_name(http: Any) -> None:
    for path, body, param in WRONG:
        refused = await http.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
