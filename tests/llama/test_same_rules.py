"""Gateway, model service and `Llama` judge any value alike: the property of the one table.

tests/e2e/test_llama_connect.py has the same with real servers.
"""

import ctypes
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.options import RequestLimits
from gateway.request.validation import text_violations
from gateway.request.window import Window
from llama.arguments import Arguments, checked
from llama.v1 import model_pb2
from llama.v1.chat_pb2 import TextCompleteRequest
from llama.v1.sampling_pb2 import SamplingParams
from model_service.engine.limits import EngineLimits
from model_service.messages import generation_request
from serving.errors import RequestError, invalid_argument
from serving.request_rules import NUMBER_RULES, FloatRule

VOCAB_SIZE = 560
REQUEST_LIMITS = RequestLimits(max_dialogs=3, max_messages=5, max_choices=4, max_sequences=8)
ENGINE_LIMITS = EngineLimits(
    context_length=256,
    vocab_size=VOCAB_SIZE,
    max_batch_size=4,
    max_step_tokens=64,
    blocks=64,
    block_size=16,
    prefix_cache=True,
    max_stall=2,
    draft_tokens=0,
)

floats = st.floats(width=32) | st.floats(-3, 101, width=32)
counts = st.integers(0, 2**32 - 1) | st.integers(0, 2)


def gateway_says(sampling: SamplingParams) -> str:
    request = TextCompleteRequest(prompts=["a"], sampling=sampling)
    found = text_violations(
        request, REQUEST_LIMITS, VOCAB_SIZE, Window(ENGINE_LIMITS.context_length)
    )
    return invalid_argument(found).message


def model_service_says(sampling: SamplingParams) -> str:
    start = model_pb2.StartSequence(sequence_id="a", prompt_ids=[1], sampling=sampling)
    try:
        generation_request(start, 0, ENGINE_LIMITS)
    except RequestError as error:
        return error.message.replace("start.", "")
    return ""


def library_says(**arguments: Any) -> str:
    given = {"temperature": 1, "top_p": 1, "max_gen_len": None, **arguments}
    try:
        checked(Arguments.texts, [], **given)
    except ValueError as error:
        return f"sampling.{error}"
    return ""


@pytest.mark.parametrize("name", NUMBER_RULES)
@given(data=st.data())
def test_any_number_is_judged_alike(name: str, data: st.DataObject) -> None:
    value = data.draw(floats if isinstance(NUMBER_RULES[name], FloatRule) else counts)
    fields: Any = {"seed": 1, name: value}
    sampling = SamplingParams(**fields)
    assert gateway_says(sampling) == model_service_says(sampling)
    if name in ("temperature", "top_p", "max_gen_len"):
        greedy = name == "temperature" and value < 0  # as in Meta's code
        assert library_says(**{name: value}) == ("" if greedy else gateway_says(sampling))


@given(value=st.floats())
def test_the_library_judges_the_number_that_would_be_sent(value: float) -> None:
    sent = SamplingParams(seed=1, top_p=ctypes.c_float(value).value)
    assert library_says(top_p=value) == gateway_says(sent)


@given(
    bias=st.dictionaries(st.integers(550, 570), st.floats(-150, 150, width=32), max_size=3),
    stops=st.lists(st.integers(550, 570), max_size=3),
    stop=st.lists(st.text(max_size=1), max_size=3),
)
def test_lists_are_judged_alike(bias: dict[int, float], stops: list[int], stop: list[str]) -> None:
    sampling = SamplingParams(seed=1, logit_bias=bias, stop_token_ids=stops, stop=stop)
    assert gateway_says(sampling) == model_service_says(sampling)
