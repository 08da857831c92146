"""Score: the prompts that the model is given, refusals, quotas and cancellation."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_status.rpc_status import from_call
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.options import RequestLimits
from gateway.request.scoring import MAX_JOINED_BYTES, encode_candidates, read_scoring
from gateway.request.window import Window
from llama.prompt_format.dialog import Segment, open_turn
from llama.prompt_format.formats import LLAMA2
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_USER,
    Dialog,
    Message,
    ScoreRequest,
)
from llama.v1.model_pb2 import StartSequence, TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH, TokenIds
from serving.errors import RequestError
from tests.gateway.conftest import (
    CONTEXT_LENGTH,
    RunningGateway,
    ScriptedModel,
    StartGateway,
    StartGuarded,
    StartServer,
)
from tokenizer_service.tokenizer import Tokenizer

PROMPT = "The llama walks over"
CANDIDATES = [" the bridge", " the road", " a river"]
LIMITS = RequestLimits(max_dialogs=64, max_messages=64, max_choices=16, max_sequences=64)
TEXTS = st.text("ab  \n🦙", max_size=8) | st.text(max_size=6)


def ask(content: str = "What do llamas eat?") -> Dialog:
    return Dialog(messages=[Message(role=ROLE_USER, content=content)])


def ids_of(*ids: int) -> TokenIds:
    return TokenIds(ids=ids)


async def encoded(
    tokenizer: Tokenizer, request: ScoreRequest, *, bos: bool = True, length: int = CONTEXT_LENGTH
) -> tuple[list[list[int]], int]:
    """The prompts of a request, and where they are scored from."""

    async def encode(segments: Sequence[Segment]) -> list[list[int]]:
        return [tokenizer.encode(each.text, each.bos and bos, each.eos) for each in segments]

    window = Window(length, tokenizer.max_token_bytes, has_bos=bos)
    scoring = read_scoring(request, LIMITS, tokenizer.n_words, window, LLAMA2)
    prompts = await encode_candidates(scoring, encode, window)
    [scored_from] = {prompt.scored_from for prompt in prompts}
    return [prompt.ids for prompt in prompts], scored_from


@given(prompt=TEXTS, candidates=st.lists(TEXTS.filter(len), min_size=1, max_size=4))
async def test_candidates_are_encoded_with_their_prompt_and_scored_from_one_token_on(
    tokenizer: Tokenizer, prompt: str, candidates: list[str]
) -> None:
    request = ScoreRequest(prompt=prompt, candidates=candidates)
    ids, scored_from = await encoded(tokenizer, request)
    assert ids == [tokenizer.encode(prompt + each, bos=True, eos=False) for each in candidates]
    known = [tokenizer.encode(prompt, bos=True, eos=False), *ids]
    assert len({tuple(each[:scored_from]) for each in known}) == 1
    longer = {tuple(each[: scored_from + 1]) for each in known if len(each) > scored_from}
    assert len(longer) > 1 or len(known[0]) == scored_from
    assert all(len(each) > scored_from for each in ids)


async def test_candidates_for_a_dialog_are_answers_to_it(tokenizer: Tokenizer) -> None:
    hi = Message(role=ROLE_ASSISTANT, content="Hi")
    dialog = Dialog(messages=[*ask("Hello").messages, hi, *ask().messages])
    by_text, scored_from = await encoded(
        tokenizer, ScoreRequest(dialog=dialog, candidates=["Grass.", "Stones."])
    )
    before = tokenizer.encode("[INST] Hello [/INST] Hi ", bos=True, eos=True)
    prompt = before + tokenizer.encode(open_turn("What do llamas eat?"), bos=True, eos=False)
    for ids, answer in zip(by_text, ("Grass.", "Stones."), strict=True):
        text = open_turn("What do llamas eat?") + " " + answer
        assert ids == before + tokenizer.encode(text, bos=True, eos=False)
    assert by_text[0][:scored_from] == prompt
    request = ScoreRequest(dialog=dialog, candidate_ids=[ids_of(*by_text[0][scored_from:])])
    assert await encoded(tokenizer, request) == (by_text[:1], scored_from)


async def test_token_across_the_border_is_scored(tokenizer: Tokenizer) -> None:
    """Where a space at the end of the prompt belongs to the candidate's first token."""
    [ids], scored_from = await encoded(
        tokenizer, ScoreRequest(prompt="What do ", candidates=["llamas"])
    )
    assert ids == tokenizer.encode("What do llamas", bos=True, eos=False)
    assert ids[:scored_from] == tokenizer.encode("What do", bos=True, eos=False)


async def test_nothing_predicts_the_first_token_of_a_text(tokenizer: Tokenizer) -> None:
    request = ScoreRequest(candidates=["llamas"], prompt="")
    assert (await encoded(tokenizer, request))[1] == 1
    with pytest.raises(RequestError, match=r"^prompt: must have a token in front of the candidate"):
        await encoded(tokenizer, request, bos=False)


async def test_candidates_that_do_not_fit_are_named_with_both_numbers(tokenizer: Tokenizer) -> None:
    request = ScoreRequest(prompt=PROMPT, candidates=[" a", " the bridge of ropes", " a", "  the"])
    ids, _ = await encoded(tokenizer, request)
    length = len(ids[0])
    with pytest.raises(RequestError) as refused:
        await encoded(tokenizer, request, length=length)
    assert [(each.field, each.description) for each in refused.value.violations] == [
        (
            f"candidates[{index}]",
            f"has {len(ids[index])} tokens with the prompt, the context length is {length}",
        )
        for index in (1, 3)
    ]


LONG = "x" * 100_000
WRONG: dict[str, tuple[ScoreRequest, list[tuple[str, str]]]] = {
    "nothing": (
        ScoreRequest(),
        [
            ("prompt", "must be given, or prompt_ids or dialog instead"),
            ("candidates", "must not be empty"),
        ],
    ),
    "both": (
        ScoreRequest(prompt="a", candidates=["b"], candidate_ids=[ids_of(5)]),
        [("candidate_ids", "cannot be given together with candidates")],
    ),
    "texts_behind_ids": (
        ScoreRequest(prompt_ids=ids_of(1), candidates=["b"]),
        [("candidates", "need a prompt or a dialog; behind prompt_ids, give candidate_ids")],
    ),
    "empty": (
        ScoreRequest(prompt="a", candidates=["b", ""]),
        [("candidates[1]", "must not be empty")],
    ),
    "empty_ids": (
        ScoreRequest(prompt_ids=ids_of(), candidate_ids=[ids_of(5), ids_of()]),
        [("prompt_ids.ids", "must not be empty"), ("candidate_ids[1].ids", "must not be empty")],
    ),
    "ids": (
        ScoreRequest(prompt_ids=ids_of(1, 560), candidate_ids=[ids_of(5), ids_of(5, 6, 9999)]),
        [
            ("prompt_ids.ids[1]", "must be less than the vocabulary size, 560, not 560"),
            ("candidate_ids[1].ids[2]", "must be less than the vocabulary size, 560, not 9999"),
        ],
    ),
    "many": (
        ScoreRequest(prompt="a", candidates=["b"] * 65),
        [("candidates", "must hold at most 64 entries, not 65")],
    ),
    "many_ids": (
        ScoreRequest(prompt="a", candidate_ids=[ids_of(5)] * 65),
        [("candidate_ids", "must hold at most 64 entries, not 65")],
    ),
    "options": (
        ScoreRequest(prompt="a", candidates=["b"], top_logprobs=21, priority=-101),
        [
            ("top_logprobs", "must be 0 to 20, not 21"),
            ("priority", "must be -100 to 100, not -101"),
        ],
    ),
    "token_ids": (
        ScoreRequest(prompt="a", candidates=["b"], logprob_token_ids=[560]),
        [("logprob_token_ids[0]", "must be less than the vocabulary size, 560, not 560")],
    ),
    "roles": (
        ScoreRequest(dialog=Dialog(messages=[Message(role=ROLE_ASSISTANT)]), candidates=["b"]),
        [
            (
                "dialog.messages[0].role",
                "the first message must be from the system or the user, not from the assistant",
            )
        ],
    ),
    "tags": (
        ScoreRequest(dialog=ask("a [/INST]"), candidates=["b"]),
        [("dialog", "must not hold a special tag: [INST], [/INST], <<SYS>>, <</SYS>>")],
    ),
    "long_ids": (
        ScoreRequest(prompt_ids=ids_of(*[5] * 300), candidate_ids=[ids_of(5)]),
        [("prompt_ids", "has 300 tokens, the context length is 256")],
    ),
    "long_together": (
        ScoreRequest(prompt_ids=ids_of(*[5] * 250), candidate_ids=[ids_of(5), ids_of(*[5] * 7)]),
        [("candidate_ids[1]", "has 257 tokens with the prompt, the context length is 256")],
    ),
    "joined": (
        ScoreRequest(prompt="x" * 1500, candidates=["x" * 64_500] * 64),
        [
            (
                "candidates",
                f"with the prompt in front of each have 4224000 bytes, at most {MAX_JOINED_BYTES} "
                "are scored in one call: give fewer candidates",
            )
        ],
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_requests_are_told_fields_and_rules(
    gateway: RunningGateway, model: ScriptedModel, name: str
) -> None:
    request, violations = WRONG[name]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Score(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status, found = from_call(refused.value), BadRequest()  # type: ignore[arg-type]
    assert status is not None
    status.details[0].Unpack(found)
    assert [(each.field, each.description) for each in found.field_violations] == violations
    assert model.starts.empty()


@pytest.mark.parametrize("field", ["prompt", "candidates[0]"])
async def test_text_that_cannot_fit_is_refused_unencoded(
    gateway: RunningGateway, field: str
) -> None:
    request = ScoreRequest(prompt="a", candidates=[LONG])
    if field == "prompt":
        request = ScoreRequest(prompt=LONG, candidates=["a"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Score(request)
    assert str(refused.value.details()).startswith(f"{field}: ")
    assert "at least" in str(refused.value.details())


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
    tell_scores(model, starts[1])
    call.cancel()
    ended = {await model.cancels.get(), await model.cancels.get()}
    assert ended == {starts[0].sequence_id, starts[2].sequence_id}
    entry = await log.wait_for("request finished")
    assert (entry["method"], entry["code"]) == ("Score", "CANCELLED")


async def test_passed_deadline_ends_all_of_its_sequences(
    gateway: RunningGateway, model: ScriptedModel
) -> None:
    request = ScoreRequest(prompt=PROMPT, candidates=CANDIDATES)
    call = gateway.stub.Score(request, timeout=1)
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
        ({"prompt": None, "dialog": ask("They"), "candidates": ["spit"]}, ["candidates[0]"]),
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
    for fields in ({"prompt_ids": prompt}, {"dialog": ask("They")}):
        with pytest.raises(grpc.aio.AioRpcError, match=r"candidate_ids\[1\]: is unsafe"):
            await gateway.stub.Score(ScoreRequest(candidate_ids=[safe, unsafe], **fields))
    call, [start] = await score(
        gateway.stub, model, prompt=None, prompt_ids=prompt, candidates=[], candidate_ids=[safe]
    )
    tell_scores(model, start)
    assert len((await call).scores[0].tokens) == len(safe.ids)
