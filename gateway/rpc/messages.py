"""Messages of the public contract, made from what the gateway generated."""

from gateway.generation.answer import Delta
from gateway.generation.completion import Event, Finished, Place, Prediction, Started
from gateway.request.validation import SAMPLING_DEFAULTS, RequestLimits, default_max_gen_len
from gateway.settings import GatewaySettings
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import SamplingParams
from serving.request_rules import MAX_TOP_LOGPROBS


def stream_event(event_number: int, place: Place, event: Event) -> chat_pb2.StreamEvent:
    """An event of the answer at `place`, as the stream's event of this number."""
    response = chat_pb2.StreamEvent(event_number=event_number)
    match event:
        case Started():
            started = chat_pb2.Started(
                index=place.index,
                choice_index=place.choice,
                prompt_tokens=event.usage.prompt_tokens,
                seed=event.seed,
                dropped_turns=event.dropped_turns,
                fingerprint=event.fingerprint,
                determinism=event.determinism,
            )
            response.started.CopyFrom(started)
        case Delta():
            delta = chat_pb2.Delta(
                index=place.index,
                choice_index=place.choice,
                text=event.text,
                tokens=event.tokens,
            )
            response.delta.CopyFrom(delta)
        case Finished():
            finished = chat_pb2.Finished(
                index=place.index,
                choice_index=place.choice,
                finish_reason=event.reason,
                safety_categories=event.safety_categories,
                usage=event.usage,
                failovers=event.resumed,
            )
            response.finished.CopyFrom(finished)
    return response


def prediction_message(prediction: Prediction) -> chat_pb2.Prediction:
    """A prediction without its tokens."""
    return chat_pb2.Prediction(
        index=prediction.place.index,
        choice_index=prediction.place.choice,
        text=prediction.text,
        finish_reason=prediction.finished.reason,
        safety_categories=prediction.finished.safety_categories,
        usage=prediction.finished.usage,
        seed=prediction.started.seed,
        dropped_turns=prediction.started.dropped_turns,
        fingerprint=prediction.started.fingerprint,
        determinism=prediction.started.determinism,
        failovers=prediction.finished.resumed,
    )


def model_response(
    info: model_pb2.GetModelInfoResponse,
    replicas: int,
    limits: RequestLimits,
    settings: GatewaySettings,
) -> chat_pb2.GetModelResponse:
    """The model that `replicas` ready replicas serve, for a caller with these limits."""
    defaults = SamplingParams(max_gen_len=default_max_gen_len(info.context_length))
    defaults.MergeFrom(SAMPLING_DEFAULTS)
    return chat_pb2.GetModelResponse(
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
        limits=chat_pb2.Limits(
            max_dialogs=limits.max_dialogs,
            max_messages=limits.max_messages,
            max_choices=limits.max_choices,
            max_top_logprobs=MAX_TOP_LOGPROBS,
            max_sequences=limits.max_sequences,
            max_request_bytes=settings.max_request_bytes,
            max_response_bytes=settings.max_response_bytes,
        ),
        sampling_defaults=defaults,
    )
