"""Calls of Score over real ports: sums, admission, the end of a call, limits and safety."""

import hashlib
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ScoreRequest,
)
from llama.v1.model_pb2 import StartSequence, TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH, TokenIds
from tests.gateway.conftest import (
    RunningGateway,
    ScriptedModel,
    StartGateway,
    StartGuarded,
    StartServer,
)
from tests.gateway.messages import dialog, ids_of
from tokenizer_service.tokenizer import Tokenizer

PROMPT = "The llama walks over"


CANDIDATES = [" the bridge", " the road", " a river"]


async def score(stub: Any, model: ScriptedModel, **fields: Any) -> tuple[Any, list[StartSequence]]:
    """A Score call that runs, and the sequences that it started."""
    request = ScoreRequest(**{"prompt": PROMPT, "candidates": CANDIDATES, **fields})
    call = stub.Score(request)
    count = len(request.candidates) + len(request.candidate_ids)
    return call, [await model.starts.get() for _ in range(count)]


async def score_ids(
    stub: Any, model: ScriptedModel, candidate: TokenIds, **fields: Any
) -> tuple[Any, list[StartSequence]]:
    """A Score call that runs, for one candidate behind BOS."""
    ids: dict[str, Any] = {"prompt_ids": ids_of(1), "candidate_ids": [candidate]}
    return await score(stub, model, prompt=None, candidates=[], **ids, **fields)


def tell_scores(model: ScriptedModel, start: StartSequence, first_rank: int = 1) -> None:
    """Lets the model score a sequence: its n-th token has the logprob -n."""
    ids = start.prompt_ids[start.scored_from :]
    count = start.top_logprobs
    tops = [TopLogprobs(ids=range(5, 5 + count), logprobs=[-1] * count) for _ in ids]
    model.tell(
        start.sequence_id,
        ids=ids,
        logprobs=[-float(n) for n in range(1, len(ids) + 1)],
        ranks=[first_rank] + [1] * (len(ids) - 1),
        top=tops if count else [],
        finish_reason=FINISH_REASON_LENGTH,
    )


async def test_scores_are_sums_in_the_order_of_the_candidates(
    gateway: RunningGateway, model: ScriptedModel, tokenizer: Tokenizer
) -> None:
    call, starts = await score(gateway.stub, model, top_logprobs=2, priority=3)
    for start in starts:
        assert (start.prompt_logprobs, start.sampling.max_gen_len, start.priority) == (True, 0, 3)
    for start, rank in zip(reversed(starts), (1, 2, 1), strict=True):
        tell_scores(model, start, rank)
    response = await call
    assert (response.model, response.fingerprint) == ("scripted", "weights")
    assert response.id
    assert [each.index for each in response.scores] == [0, 1, 2]
    assert [each.is_greedy for each in response.scores] == [True, False, True]
    for each, start, text in zip(response.scores, starts, CANDIDATES, strict=True):
        joined = tokenizer.encode(PROMPT + text, bos=True, eos=False)
        assert [*start.prompt_ids] == joined
        assert [token.id for token in each.tokens] == joined[start.scored_from :]
        assert each.logprob == math.fsum(token.logprob for token in each.tokens) < 0
        assert [len(token.top_logprobs) for token in each.tokens] == [2] * len(each.tokens)
        assert each.usage.prompt_tokens == len(joined)
        assert each.usage.completion_tokens == 0


async def test_replica_that_reports_the_whole_prompt_gives_no_scores(
    gateway: RunningGateway, model: ScriptedModel
) -> None:
    """As one of an older version would, in the middle of an upgrade."""
    call, starts = await score(gateway.stub, model)
    starts[1].scored_from = 0
    for start in starts:
        tell_scores(model, start)
    with pytest.raises(grpc.aio.AioRpcError, match="is of an older version and cannot score") as e:
        await call
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_candidates_count_as_generations_of_the_key(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    tmp_path: Path,
) -> None:
    keys, key = tmp_path / "keys.toml", "a key that is long enough"
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(
        f'[[keys]]\nname = "ada"\nsha256 = "{digest}"\nmax_sequences = 4\nmax_tokens = 60\n'
    )
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, api_keys=keys)
    await gateway.until(serving=True)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Score(ScoreRequest(prompt=PROMPT, candidates=CANDIDATES))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    bearer = (("authorization", f"Bearer {key}"),)
    five = ScoreRequest(prompt="a", candidates=["b"] * 5)
    with pytest.raises(grpc.aio.AioRpcError, match="candidates: must hold at most 4 entries"):
        await gateway.stub.Score(five, metadata=bearer)
    three = ScoreRequest(prompt="a", candidates=["b"] * 3)
    running = gateway.stub.Score(three, metadata=bearer)
    assert [await model.starts.get() for _ in range(3)]
    with pytest.raises(grpc.aio.AioRpcError, match="3 of 4 sequences of this key run or wait"):
        await gateway.stub.Score(three, metadata=bearer)
    running.cancel()
    tokens = ScoreRequest(prompt_ids=ids_of(*[5] * 30), candidate_ids=[ids_of(6), ids_of(7)])
    with pytest.raises(grpc.aio.AioRpcError, match=r"the request may take 62 tokens"):
        await gateway.stub.Score(tokens, metadata=bearer)


async def test_cancelled_call_ends_all_of_its_sequences(
    gateway: RunningGateway, model: ScriptedModel, log: Any
) -> None:
    call, starts = await score(gateway.stub, model)
    call.cancel()
    ended = {await model.cancels.get() for _ in starts}
    assert ended == {start.sequence_id for start in starts}
    entry = await log.wait_for("request finished")
    assert (entry["method"], entry["code"]) == ("Score", "CANCELLED")


async def test_passed_deadline_ends_all_of_its_sequences(
    gateway: RunningGateway, model: ScriptedModel
) -> None:
    request = ScoreRequest(prompt=PROMPT, candidates=CANDIDATES)
    call = gateway.stub.Score(request, timeout=2)
    starts = {(await model.starts.get()).sequence_id for _ in CANDIDATES}
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert {await model.cancels.get() for _ in CANDIDATES} == starts


async def test_account_has_the_prompt_tokens_and_no_first_token(
    gateway: RunningGateway, model: ScriptedModel, log: Any
) -> None:
    call, starts = await score(gateway.stub, model)
    for start in starts:
        tell_scores(model, start)
    await call
    entry = await log.wait_for("request finished")
    assert (entry["method"], entry["code"], entry["answers"]) == ("Score", "OK", 3)
    assert entry["prompt_tokens"] == sum(len(start.prompt_ids) for start in starts)
    assert (entry["completion_tokens"], entry["finish_reasons"]) == (0, {"length": 3})


async def test_lost_replica_is_replaced_before_the_scores_are_there(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, server = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address)
    await gateway.until(serving=True)
    call, [first] = await score(gateway.stub, model, candidates=CANDIDATES[:1])
    await server.aclose()
    await start_server(model.service(), port=int(address.rpartition(":")[2]))
    again = await model.starts.get()
    assert (again.prompt_ids, again.scored_from) == (first.prompt_ids, first.scored_from)
    tell_scores(model, again)
    assert (await call).scores[0].is_greedy


async def test_scores_that_would_be_too_large_are_refused_before_they_run(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_response_bytes=8192)
    await gateway.until(serving=True)
    candidate = ids_of(*[300] * 200)
    details: dict[str, dict[str, Any]] = {
        "top_logprobs": {"top_logprobs": 20},
        "logprob_token_ids": {"logprob_token_ids": range(20)},
        "candidates": {"candidate_ids": [candidate] * 3},
    }
    for field, options in details.items():
        request = ScoreRequest(prompt_ids=ids_of(1), candidate_ids=[candidate])
        request.MergeFrom(ScoreRequest(**options))
        with pytest.raises(grpc.aio.AioRpcError, match="and a unary answer may have 8192") as e:
            await gateway.stub.Score(request)
        assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(e.value.details()).startswith(field)
    assert model.starts.empty()
    call, [start] = await score_ids(gateway.stub, model, candidate)
    tell_scores(model, start)
    assert len((await call).scores[0].tokens) == 200


async def test_large_scores_are_no_slow_reader(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    """The model reports a whole candidate at once; its client waits for all of them."""
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_unread_bytes=1024)
    await gateway.until(serving=True)
    candidate = ids_of(*[300] * 200)
    call, [start] = await score_ids(gateway.stub, model, candidate, top_logprobs=20)
    tell_scores(model, start)
    assert len((await call).scores[0].tokens) == 200


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"candidates": [" spit", " grass", " a bomb"]}, ["candidates[0]", "candidates[2]"]),
        ({"prompt": "two", "candidates": [" words", " ways"]}, ["candidates[0]"]),
        ({"prompt": None, "dialog": dialog("They"), "candidates": ["spit"]}, ["candidates[0]"]),
    ],
)
async def test_unsafe_candidates_are_refused_by_name(
    start_guarded: StartGuarded, model: ScriptedModel, fields: dict[str, Any], paths: list[str]
) -> None:
    gateway = await start_guarded()
    request = ScoreRequest(**{"prompt": PROMPT, **fields})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Score(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    message = str(refused.value.details())
    assert [part.partition(":")[0] for part in message.split("; ")] == paths
    assert "is unsafe by the safety classifier: " in message
    assert model.starts.empty()


async def test_unsafe_ids_are_refused_and_safe_ones_are_scored(
    start_guarded: StartGuarded, model: ScriptedModel, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded()
    prompt = ids_of(*tokenizer.encode("They", bos=True, eos=False))
    unsafe, safe = (ids_of(*tokenizer.encode(w, bos=False, eos=False)) for w in ("spit", "eat"))
    for fields in ({"prompt_ids": prompt}, {"dialog": dialog("They")}):
        with pytest.raises(grpc.aio.AioRpcError, match=r"candidate_ids\[1\]: is unsafe"):
            await gateway.stub.Score(ScoreRequest(candidate_ids=[safe, unsafe], **fields))
    call, [start] = await score(
        gateway.stub, model, prompt=None, prompt_ids=prompt, candidates=[], candidate_ids=[safe]
    )
    tell_scores(model, start)
    assert len((await call).scores[0].tokens) == len(safe.ids)
