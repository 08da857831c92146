"""The gateway with a safety classifier: real safety services, scripted replicas."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status.rpc_status import from_call

from gateway.generation.safety.guard import DIALOG_REFUSAL
from llama.prompt_format.dialog import Message as DialogMessage
from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    StreamEvent,
    TextCompleteRequest,
)
from llama.v1.operator_pb2 import (
    UPSTREAM_STATE_CONNECTING,
    UPSTREAM_STATE_SERVING,
    GetStatusRequest,
)
from llama.v1.sampling_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_SAFETY,
    FINISH_REASON_SPECIAL_TAGS,
    FINISH_REASON_STOP,
    SamplingParams,
    TokenIds,
)
from safety_service import server as servicer
from safety_service.server import SAFE, Judgement, safety_service
from tokenizer_service.tokenizer import Tokenizer

HARMLESS = "llamas eat grass and leaves all day long"


def dialog(content: str = "What do llamas do?") -> Dialog:
    return Dialog(messages=[Message(role=ROLE_USER, content=content)])


@dataclass
class HeldClassifier:
    """Judges when the test says so."""

    asked: asyncio.Queue[Sequence[DialogMessage]] = field(default_factory=asyncio.Queue)
    verdicts: asyncio.Queue[Judgement] = field(default_factory=asyncio.Queue)
    remaining: list[float | None] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def judge(
        self, messages: Sequence[DialogMessage], time_remaining: servicer.TimeRemaining
    ) -> Judgement:
        self.remaining.append(time_remaining())
        self.asked.put_nowait(messages)
        try:
            return await self.verdicts.get()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def say(model: Any, sequence_id: str, text: str, tokenizer: Tokenizer, **last: Any) -> None:
    """Makes the model say a text, token by token; with a finish reason, and end."""
    for token_id in tokenizer.encode(text, bos=False, eos=False):
        model.tell(sequence_id, ids=[token_id], logprobs=[0.0])
    if last:
        model.tell(sequence_id, **last)


def shown(events: Sequence[StreamEvent], index: int = 0) -> str:
    deltas = [event.delta for event in events if event.HasField("delta")]
    return "".join(each.text for each in deltas if each.index == index)


async def test_unsafe_dialog_is_refused_without_model_work_and_the_others_are_answered(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded()
    dialogs = [dialog("Do they SPIT?"), dialog(), dialog("[INST] spit")]
    call = asyncio.ensure_future(gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=dialogs)))
    start = await model.starts.get()
    say(model, start.sequence_id, HARMLESS, tokenizer, finish_reason=FINISH_REASON_STOP)
    refused, answered, tagged = (await call).predictions
    assert model.starts.empty()
    assert refused.text == DIALOG_REFUSAL
    assert refused.finish_reason == FINISH_REASON_SAFETY
    assert refused.safety_categories == ["spitting"]
    assert answered.text == HARMLESS
    assert answered.finish_reason == FINISH_REASON_STOP
    assert tagged.finish_reason == FINISH_REASON_SPECIAL_TAGS


@pytest.mark.parametrize("as_ids", [False, True])
async def test_continuation_of_an_unsafe_text_is_empty(
    start_guarded: Any, tokenizer: Tokenizer, as_ids: bool
) -> None:
    gateway = await start_guarded()
    text = "how llamas spit"
    ids = TokenIds(ids=tokenizer.encode(text, bos=True, eos=False))
    given: Any = {"prompt_ids": [ids]} if as_ids else {"prompts": [text]}
    response = await gateway.stub.TextComplete(TextCompleteRequest(**given))
    [prediction] = response.predictions
    assert (prediction.text, prediction.finish_reason) == ("", FINISH_REASON_SAFETY)
    assert prediction.safety_categories == ["spitting"]


async def test_unsafe_answer_is_cut_in_front_of_its_chunk_and_its_neighbour_goes_on(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded()
    request = ChatCompleteStreamRequest(dialogs=[dialog()] * 2)
    call = gateway.stub.ChatCompleteStream(request)
    cut, kept = [(await model.starts.get()).sequence_id for _ in range(2)]
    # So much behind the word that it is judged, however the tokens are joined on their way.
    rest = "at us all day, and at all who come by, and nobody knows why"
    say(model, cut, f"They live in the Andes, and they spit {rest}", tokenizer)
    assert await model.cancels.get() == cut
    say(model, kept, HARMLESS, tokenizer, finish_reason=FINISH_REASON_STOP)
    events = [response.event async for response in call]
    assert "spit" not in shown(events)
    assert "They live in the Andes, and they spit".startswith(shown(events))
    assert shown(events, 1) == HARMLESS
    ends = {e.finished.index: e.finished for e in events if e.HasField("finished")}
    assert ends[0].finish_reason == FINISH_REASON_SAFETY
    assert ends[0].safety_categories == ["spitting"]
    assert ends[0].usage.completion_tokens > 0
    assert ends[1].finish_reason == FINISH_REASON_STOP


async def test_unsafe_end_of_a_complete_answer_is_not_shown(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded(safety_chunk=1000)
    call = asyncio.ensure_future(gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()])))
    start = await model.starts.get()
    end = {"finish_reason": FINISH_REASON_LENGTH}
    say(model, start.sequence_id, "a spit and a bomb", tokenizer, **end)
    [prediction] = (await call).predictions
    assert prediction.text == ""
    assert prediction.finish_reason == FINISH_REASON_SAFETY
    assert prediction.safety_categories == ["spitting", "weapons"]


async def test_tokens_are_held_back_even_where_a_stop_string_holds_their_text(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded(safety_chunk=4)
    sampling = SamplingParams(stop=["they spit far"])
    request = ChatCompleteStreamRequest(dialogs=[dialog()], sampling=sampling, logprobs=True)
    call = gateway.stub.ChatCompleteStream(request)
    start = await model.starts.get()
    say(model, start.sequence_id, "and then they spit far away", tokenizer)
    events = [response.event async for response in call]
    tokens = b"".join(t.bytes for event in events for t in event.delta.tokens)
    assert b"spit" not in tokens
    assert b"and then they".strip().startswith(tokens.strip())
    assert events[-1].finished.finish_reason == FINISH_REASON_SAFETY


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("logprobs", [False, True])
async def test_safe_answer_is_the_same_as_without_a_classifier(
    gateway: Any,
    start_guarded: Any,
    model: Any,
    tokenizer: Tokenizer,
    chunk: int,
    logprobs: bool,
) -> None:
    other = type(model)(model.info)
    judged = await start_guarded(replica=other, safety_chunk=chunk)
    sampling = SamplingParams(stop=["never said"], seed=1)
    answers = []
    for stub, replica in ((gateway.stub, model), (judged.stub, other)):
        request = ChatCompleteRequest(dialogs=[dialog()], sampling=sampling, logprobs=logprobs)
        call = asyncio.ensure_future(stub.ChatComplete(request))
        start = await replica.starts.get()
        text = "🦙 llamas were never seen to …"
        say(replica, start.sequence_id, text, tokenizer, finish_reason=FINISH_REASON_STOP)
        [prediction] = (await call).predictions
        prediction.usage.Clear()
        answers.append(prediction)
    assert answers[0] == answers[1]
    assert answers[0].text == "🦙 llamas were never seen to …"


async def test_model_goes_on_while_a_chunk_is_judged_and_nothing_is_shown_before(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    classifier = HeldClassifier()
    gateway = await start_guarded(classifier)
    call = gateway.stub.ChatCompleteStream(ChatCompleteStreamRequest(dialogs=[dialog()]))
    assert [m.role for m in await classifier.asked.get()] == ["user"]
    classifier.verdicts.put_nowait(SAFE)
    start = await model.starts.get()
    assert (await call.read()).event.HasField("started")
    say(model, start.sequence_id, HARMLESS, tokenizer, finish_reason=FINISH_REASON_STOP)
    first = await classifier.asked.get()
    assert [m.role for m in first] == ["user", "assistant"]
    assert HARMLESS.startswith(first[-1].content)
    classifier.verdicts.put_nowait(SAFE)
    assert (await call.read()).event.delta.text == first[-1].content
    second = (await classifier.asked.get())[-1].content
    assert len(second) > len(first[-1].content)
    assert HARMLESS.startswith(second)
    classifier.verdicts.put_nowait(Judgement(unsafe=True))
    assert (await call.read()).event.finished.finish_reason == FINISH_REASON_SAFETY


async def test_unsafe_echo_ends_an_answer_that_waits_for_its_turn(
    start_guarded: Any, model: Any
) -> None:
    classifier = HeldClassifier()
    gateway = await start_guarded(classifier, max_running_sequences=1)
    for verdict in (SAFE, SAFE, Judgement(unsafe=True), SAFE):
        classifier.verdicts.put_nowait(verdict)
    running = gateway.stub.TextComplete(TextCompleteRequest(prompts=["one"]))
    first = await model.starts.get()
    request = TextCompleteRequest(prompts=["llamas spit, as we all know"], echo=True)
    [prediction] = (await gateway.stub.TextComplete(request)).predictions
    assert (prediction.text, prediction.finish_reason) == ("", FINISH_REASON_SAFETY)
    model.tell(first.sequence_id, finish_reason=FINISH_REASON_STOP)
    await running
    later = gateway.stub.TextComplete(TextCompleteRequest(prompts=["two"]))
    model.tell((await model.starts.get()).sequence_id, finish_reason=FINISH_REASON_STOP)
    await later


async def test_deadline_and_cancellation_reach_the_classifier(start_guarded: Any) -> None:
    classifier = HeldClassifier()
    gateway = await start_guarded(classifier, safety_timeout=100)
    call = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]), timeout=60)
    await classifier.asked.get()
    assert classifier.remaining == [pytest.approx(60, abs=5)]
    call.cancel()
    await classifier.cancelled.wait()


async def test_closed_gateway_refuses_until_the_classifier_is_back(
    start_guarded: Any, start_server: Any, rules: Any
) -> None:
    gateway = await start_guarded(safety_timeout=0.2)
    found = await gateway.operator.GetStatus(GetStatusRequest())
    assert (found.serving, found.safety.state) == (True, UPSTREAM_STATE_SERVING)
    assert found.safety.target == gateway.safety_target
    await gateway.safety_server.aclose()
    await gateway.until(serving=False)
    found = await gateway.operator.GetStatus(GetStatusRequest())
    assert (found.serving, found.safety.state) == (False, UPSTREAM_STATE_CONNECTING)
    with pytest.raises(grpc.aio.AioRpcError, match="safety classifier") as refused:
        await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    status: Any = from_call(refused.value)  # type: ignore[arg-type]  # made for grpc.Call
    assert status.details[0].Is(RetryInfo.DESCRIPTOR)
    port = int(gateway.safety_target.rpartition(":")[2])
    await start_server(safety_service(rules), port=port)
    await gateway.until(serving=True)
    answer = await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog("spit")]))
    assert answer.predictions[0].finish_reason == FINISH_REASON_SAFETY


async def test_closed_gateway_ends_a_stream_that_nobody_judges_and_its_sequence(
    start_guarded: Any, model: Any, tokenizer: Tokenizer
) -> None:
    gateway = await start_guarded(safety_timeout=0.2)
    call = gateway.stub.ChatCompleteStream(ChatCompleteStreamRequest(dialogs=[dialog()]))
    start = await model.starts.get()
    await gateway.safety_server.aclose()
    await gateway.until(serving=False)
    say(model, start.sequence_id, HARMLESS, tokenizer)
    with pytest.raises(grpc.aio.AioRpcError, match="safety classifier") as ended:
        _ = [response.event async for response in call]
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await model.cancels.get() == start.sequence_id


async def test_classifier_that_restarts_costs_a_closed_gateways_stream_a_pause(
    start_guarded: Any, start_server: Any, model: Any, rules: Any, tokenizer: Tokenizer
) -> None:
    held = HeldClassifier()
    held.verdicts.put_nowait(SAFE)
    gateway = await start_guarded(held, safety_timeout=30)
    call = gateway.stub.ChatCompleteStream(ChatCompleteStreamRequest(dialogs=[dialog()]))
    start = await model.starts.get()
    say(model, start.sequence_id, HARMLESS, tokenizer, finish_reason=FINISH_REASON_STOP)
    for _ in range(2):
        await held.asked.get()
    await gateway.safety_server.aclose()  # while it judges the first chunk
    await gateway.until(serving=False)
    port = int(gateway.safety_target.rpartition(":")[2])
    await start_server(safety_service(rules), port=port)
    events = [response.event async for response in call]
    assert shown(events) == HARMLESS
    assert events[-1].finished.finish_reason == FINISH_REASON_STOP


async def test_open_gateway_goes_on_unjudged_and_says_so_once(
    start_guarded: Any, model: Any, tokenizer: Tokenizer, log: Any
) -> None:
    gateway = await start_guarded(safety_on_failure="open")
    await gateway.safety_server.aclose()
    while (await log.wait_for("upstream unusable"))["upstream"] != gateway.safety_target:
        pass
    call = gateway.stub.ChatCompleteStream(ChatCompleteStreamRequest(dialogs=[dialog("spit")]))
    start = await model.starts.get()
    say(model, start.sequence_id, "spit and bomb", tokenizer, finish_reason=FINISH_REASON_STOP)
    events = [response.event async for response in call]
    assert shown(events) == "spit and bomb"
    assert events[-1].finished.finish_reason == FINISH_REASON_STOP
    said = await log.wait_for("no judgements")
    assert said["requests"] == "unjudged"
    assert (await gateway.operator.GetStatus(GetStatusRequest())).serving
    assert "no judgements" not in {entry["event"] for entry in log.rest()}


@pytest.mark.parametrize("on_failure", ["closed", "open"])
async def test_classifier_that_takes_too_long_counts_as_gone(
    start_guarded: Any, model: Any, on_failure: str
) -> None:
    gateway = await start_guarded(
        HeldClassifier(), safety_on_failure=on_failure, safety_timeout=0.2
    )
    call = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]))
    if on_failure == "open":
        start = await model.starts.get()
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
        assert (await call).predictions[0].finish_reason == FINISH_REASON_STOP
    else:
        with pytest.raises(grpc.aio.AioRpcError, match=r"within 0\.2 seconds") as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_short_deadline_does_not_switch_the_classifier_off(
    start_guarded: Any, model: Any
) -> None:
    gateway = await start_guarded(HeldClassifier(), safety_on_failure="open")
    call = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]), timeout=0.2)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert model.starts.empty()
