"""The answer to GetModel."""

from gateway.request.options import SAMPLING_DEFAULTS, RequestLimits, default_max_gen_len
from gateway.rpc.messages import prompt_format_message
from llama.prompt_format.formats import PromptFormat
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import SamplingParams
from serving.request_rules import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS


def model_response(
    info: model_pb2.GetModelInfoResponse,
    replicas: int,
    limits: RequestLimits,
    *,
    prompt_format: PromptFormat,
    max_request_bytes: int,
    max_response_bytes: int,
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
            max_logprob_token_ids=MAX_LOGPROB_TOKEN_IDS,
            max_sequences=limits.max_sequences,
            max_request_bytes=max_request_bytes,
            max_response_bytes=max_response_bytes,
        ),
        sampling_defaults=defaults,
        prompt_format=prompt_format_message(prompt_format),
    )
