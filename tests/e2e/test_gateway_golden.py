"""Meta's own answers to the golden cases, through the gateway: 1, 2 and 4 shards, 1 to 4 files."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from llama.v1 import chat_pb2_grpc
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
    Token,
)
from llama.v1.sampling_pb2 import FINISH_REASON_SPECIAL_TAGS, SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
ROLES = {"system": ROLE_SYSTEM, "user": ROLE_USER, "assistant": ROLE_ASSISTANT}

Case = dict[str, Any]


def read_cases(name: str) -> dict[str, Case]:
    cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return {case["id"]: case for case in cases}


CASE_IDS = {
    kind: [case["id"] for case in read_cases("mha").values() if case["kind"] == kind]
    for kind in ("chat", "text")
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running stack, and what Meta's code answers on its weights."""

    stub: chat_pb2_grpc.ChatServiceStub
    cases: dict[str, Case]


# Meta's answers, the checkpoint that serves them, and on how many shards.
SERVED = [
    ("gqa", "gqa-mp2", 1),
    ("mha-bf16", "mha-mp1-bf16", 1),
]
# Shards take long on two cores: four get all dialogs at once only.
CROWDED = [("gqa", "gqa-mp4", 4)]


def on(*served: tuple[str, str, int]) -> pytest.MarkDecorator:
    """Runs a test on these deployments."""
    names = [f"{checkpoint}-on-{shards}" for _, checkpoint, shards in served]
    return pytest.mark.parametrize("deployment", served, indirect=True, ids=names, scope="module")


@pytest.fixture(scope="module")
def deployment(
    request: pytest.FixtureRequest, services: Callable[..., AbstractContextManager[Any]]
) -> Iterator[Deployment]:
    answers, checkpoint, shards = request.param
    with (
        services(checkpoint, shards) as stack,
        grpc.insecure_channel(stack.gateway.address) as channel,
    ):
        yield Deployment(chat_pb2_grpc.ChatServiceStub(channel), read_cases(answers))


def sampling(case: Case) -> SamplingParams:
    """Meta's arguments; absent where Meta's is None."""
    args = case["args"]
    return SamplingParams(
        temperature=args["temperature"], top_p=args["top_p"], max_gen_len=args["max_gen_len"]
    )


def dialog(case: Case) -> Dialog:
    messages = [
        Message(role=ROLES[each["role"]], content=each["content"]) for each in case["dialog"]
    ]
    return Dialog(messages=messages)


def assert_tokens_equal(tokens: list[Token], case: Case) -> None:
    assert [token.id for token in tokens] == case["ids"]
    assert [token.text for token in tokens] == case["tokens"]
    assert [token.logprob for token in tokens] == pytest.approx(case["logprobs"], abs=1e-4)


@on(*SERVED)
@pytest.mark.parametrize("case_id", CASE_IDS["chat"])
def test_chat_answer_is_metas(deployment: Deployment, case_id: str) -> None:
    case = deployment.cases[case_id]
    fields: Any = {"dialogs": [dialog(case)], "sampling": sampling(case), "logprobs": True}
    [unary] = deployment.stub.ChatComplete(ChatCompleteRequest(**fields)).predictions
    rendered = deployment.stub.RenderPrompt(RenderPromptRequest(dialog=dialog(case)))
    stream = deployment.stub.ChatCompleteStream(ChatCompleteStreamRequest(**fields))
    events = [response.event for response in stream]
    refused = case_id.startswith("special_tag")
    assert list(rendered.ids) == case["prompt_ids"]
    assert rendered.has_special_tags is refused
    assert unary.text == case["content"]
    assert "".join(event.delta.text for event in events) == case["content"]
    if refused:
        assert (unary.finish_reason, len(unary.tokens)) == (FINISH_REASON_SPECIAL_TAGS, 0)
    else:
        assert_tokens_equal(list(unary.tokens), case)
        assert_tokens_equal([t for e in events for t in e.delta.tokens], case)


@on(*SERVED)
@pytest.mark.parametrize("case_id", CASE_IDS["text"])
def test_continued_text_is_metas(deployment: Deployment, case_id: str) -> None:
    case = deployment.cases[case_id]
    fields: Any = {
        "prompts": [case["prompt"]],
        "sampling": sampling(case),
        "logprobs": True,
        "echo": case["args"]["echo"],
    }
    [unary] = deployment.stub.TextComplete(TextCompleteRequest(**fields)).predictions
    stream = deployment.stub.TextCompleteStream(TextCompleteStreamRequest(**fields))
    events = [response.event for response in stream]
    assert unary.text == case["content"]
    assert "".join(event.delta.text for event in events) == case["content"]
    assert unary.usage.prompt_tokens == len(case["prompt_ids"])
    assert_tokens_equal(list(unary.tokens), case)
    assert_tokens_equal([t for e in events for t in e.delta.tokens], case)


@on(*SERVED, *CROWDED)
def test_all_dialogs_in_one_request_get_the_answers_they_get_alone(deployment: Deployment) -> None:
    cases = [deployment.cases[case_id] for case_id in CASE_IDS["chat"]]
    alike = [case for case in cases if case["args"]["max_gen_len"] == 32]
    request = ChatCompleteRequest(
        dialogs=map(dialog, alike), sampling=sampling(alike[0]), logprobs=True
    )
    predictions = deployment.stub.ChatComplete(request).predictions
    assert [each.text for each in predictions] == [each["content"] for each in alike]
    for prediction, case in zip(predictions, alike, strict=True):
        if prediction.finish_reason != FINISH_REASON_SPECIAL_TAGS:
            assert_tokens_equal(list(prediction.tokens), case)
