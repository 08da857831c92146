"""What the gateway made, as messages of the public contract. Chat and text messages differ in names
alone, but clients read those names: both are written out.
"""

from gateway.generation.answer import Delta
from gateway.generation.completion import Event, Finished, Place, Prediction, Started
from gateway.request.validation import SAMPLING_DEFAULTS, RequestLimits, default_max_gen_len
from gateway.settings import GatewaySettings
from llama.v1 import model_pb2
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ChatCompleteStreamResponse,
    ChatDelta,
    ChatFinished,
    ChatPrediction,
    ChatStarted,
    GetModelResponse,
    Limits,
    Message,
    ResumeStreamResponse,
    TextCompleteStreamResponse,
    TextDelta,
    TextFinished,
    TextPrediction,
    TextStarted,
)
from llama.v1.sampling_pb2 import SamplingParams
from serving.request_rules import MAX_TOP_LOGPROBS


def chat_event(sequence: int, place: Place, event: Event) -> ChatCompleteStreamResponse:
    """The event of the answer at `place`, `sequence`-th of its stream."""
    response = ChatCompleteStreamResponse(sequence=sequence)
    match event:
        case Started():
            started = ChatStarted(
                dialog_index=place.index,
                choice_index=place.choice,
                usage=event.usage,
                seed=event.seed,
                fingerprint=event.fingerprint,
                determinism=event.determinism,
                dropped_turns=event.dropped_turns,
            )
            response.started.CopyFrom(started)
        case Delta():
            delta = ChatDelta(
                dialog_index=place.index,
                choice_index=place.choice,
                text=event.text,
                tokens=event.tokens,
            )
            response.delta.CopyFrom(delta)
        case Finished():
            finished = ChatFinished(
                dialog_index=place.index,
                choice_index=place.choice,
                finish_reason=event.reason,
                usage=event.usage,
                resumed=event.resumed,
                safety_categories=event.safety_categories,
            )
            response.finished.CopyFrom(finished)
    return response


def text_event(sequence: int, place: Place, event: Event) -> TextCompleteStreamResponse:
    """The event of the answer at `place`, `sequence`-th of its stream."""
    response = TextCompleteStreamResponse(sequence=sequence)
    match event:
        case Started():
            started = TextStarted(
                prompt_index=place.index,
                choice_index=place.choice,
                usage=event.usage,
                seed=event.seed,
                fingerprint=event.fingerprint,
                determinism=event.determinism,
            )
            response.started.CopyFrom(started)
        case Delta():
            delta = TextDelta(
                prompt_index=place.index,
                choice_index=place.choice,
                text=event.text,
                tokens=event.tokens,
            )
            response.delta.CopyFrom(delta)
        case Finished():
            finished = TextFinished(
                prompt_index=place.index,
                choice_index=place.choice,
                finish_reason=event.reason,
                usage=event.usage,
                resumed=event.resumed,
                safety_categories=event.safety_categories,
            )
            response.finished.CopyFrom(finished)
    return response


def resumed_event(
    event: ChatCompleteStreamResponse | TextCompleteStreamResponse,
) -> ResumeStreamResponse:
    """An event as ResumeStream tells it."""
    match event:
        case ChatCompleteStreamResponse():
            return ResumeStreamResponse(chat=event)
        case TextCompleteStreamResponse():
            return ResumeStreamResponse(text=event)


def chat_prediction(prediction: Prediction) -> ChatPrediction:
    """All but the tokens."""
    return ChatPrediction(
        choice_index=prediction.place.choice,
        generation=Message(role=ROLE_ASSISTANT, content=prediction.text),
        finish_reason=prediction.finished.reason,
        usage=prediction.finished.usage,
        resumed=prediction.finished.resumed,
        safety_categories=prediction.finished.safety_categories,
        seed=prediction.started.seed,
        fingerprint=prediction.started.fingerprint,
        determinism=prediction.started.determinism,
        dropped_turns=prediction.started.dropped_turns,
    )


def text_prediction(prediction: Prediction) -> TextPrediction:
    """All but the tokens."""
    return TextPrediction(
        choice_index=prediction.place.choice,
        generation=prediction.text,
        finish_reason=prediction.finished.reason,
        usage=prediction.finished.usage,
        resumed=prediction.finished.resumed,
        safety_categories=prediction.finished.safety_categories,
        seed=prediction.started.seed,
        fingerprint=prediction.started.fingerprint,
        determinism=prediction.started.determinism,
    )


def model_response(
    info: model_pb2.GetModelInfoResponse,
    replicas: int,
    limits: RequestLimits,
    settings: GatewaySettings,
) -> GetModelResponse:
    """What `replicas` healthy replicas serve to a caller with these limits."""
    defaults = SamplingParams(max_gen_len=default_max_gen_len(info.context_length))
    defaults.MergeFrom(SAMPLING_DEFAULTS)
    return GetModelResponse(
        name=info.name,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        parameters=info.parameters,
        shards=info.shards,
        replicas=replicas,
        dtype=info.dtype,
        quantization=info.quantization,
        fingerprint=info.fingerprint,
        determinism=info.determinism,
        limits=Limits(
            max_dialogs=limits.max_dialogs,
            max_messages=limits.max_messages,
            max_request_bytes=settings.max_request_bytes,
            max_queued_sequences=limits.max_sequences,
            max_top_logprobs=MAX_TOP_LOGPROBS,
            max_choices=limits.max_choices,
            max_response_bytes=settings.max_response_bytes,
        ),
        sampling_defaults=defaults,
    )
