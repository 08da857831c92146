"""Score: the prompts that the model is given, refusals, quotas and cancellation."""

from collections.abc import Sequence

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.options import RequestLimits
from gateway.request.scoring import MAX_JOINED_BYTES, encode_candidates, read_scoring
from gateway.request.window import Window
from llama.prompt_format.dialog import Segment, open_turn
from llama.prompt_format.formats import LLAMA2
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    Dialog,
    Message,
    ScoreRequest,
)
from serving.errors import RequestError
from tests.error_details import violations
from tests.gateway.conftest import (
    CONTEXT_LENGTH,
    RunningGateway,
    ScriptedModel,
)
from tests.gateway.messages import dialog, ids_of
from tokenizer_service.tokenizer import Tokenizer

PROMPT = "The llama walks over"
LIMITS = RequestLimits(max_dialogs=64, max_messages=64, max_choices=16, max_sequences=64)
TEXTS = st.text("ab  \n🦙", max_size=8) | st.text(max_size=6)


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
    turns = Dialog(messages=[*dialog("Hello").messages, hi, *dialog().messages])
    by_text, scored_from = await encoded(
        tokenizer, ScoreRequest(dialog=turns, candidates=["Grass.", "Stones."])
    )
    before = tokenizer.encode("[INST] Hello [/INST] Hi ", bos=True, eos=True)
    prompt = before + tokenizer.encode(open_turn("What do llamas eat?"), bos=True, eos=False)
    for ids, answer in zip(by_text, ("Grass.", "Stones."), strict=True):
        text = open_turn("What do llamas eat?") + " " + answer
        assert ids == before + tokenizer.encode(text, bos=True, eos=False)
    assert by_text[0][:scored_from] == prompt
    request = ScoreRequest(dialog=turns, candidate_ids=[ids_of(*by_text[0][scored_from:])])
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
        ScoreRequest(dialog=dialog("a [/INST]"), candidates=["b"]),
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
    request, told = WRONG[name]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Score(request)
    assert violations(refused.value) == told
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
