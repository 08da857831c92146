"""`Llama.connect` against `Llama.build`: the same arguments give the same results and errors."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from client import Client, InvalidRequestError
from llama import Llama
from llama.remote import RemoteLlama
from llama.v1 import model_pb2, model_pb2_grpc, sampling_pb2
from tests.e2e.deployments import Stack
from tests.e2e.processes import ServiceProcess
from tests.llama.conftest import DIALOG, build

TAGGED = [{"role": "user", "content": "[INST]"}]


@pytest.fixture(scope="module")
def built() -> Llama:
    return build("mha-mp1")


@pytest.fixture(scope="module")
def connected(stack: Stack) -> Iterator[RemoteLlama]:
    with Llama.connect(stack.gateway.address) as llama:
        yield llama


def assert_equal(connected: Any, built: Any) -> None:
    """Logprobs come as 32-bit floats over the wire."""
    if isinstance(built, float):
        assert connected == pytest.approx(built, abs=1e-4)
    elif isinstance(built, dict):
        assert connected.keys() == built.keys()
        for key in built:
            assert_equal(connected[key], built[key])
    elif isinstance(built, list | tuple):
        assert len(connected) == len(built)
        for one, other in zip(connected, built, strict=True):
            assert_equal(one, other)
    else:
        assert connected == built


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_gen_len", [0, 1, 12, None])
@pytest.mark.parametrize("prompts", [[], [[1, 100, 101], [1, 5], [1] + [400] * 255]])
def test_generate_is_the_same(
    built: Llama,
    connected: RemoteLlama,
    prompts: list[list[int]],
    max_gen_len: Any,
    echo: bool,
    logprobs: bool,
) -> None:
    arguments: Any = (prompts, max_gen_len, 0.0, 0.9, logprobs, echo)
    assert_equal(connected.generate(*arguments), built.generate(*arguments))


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_gen_len", [0, 12])
@pytest.mark.parametrize("prompts", [[], ["Llamas are", "", "  áé\n"]])
def test_text_completion_is_the_same(
    built: Llama,
    connected: RemoteLlama,
    prompts: list[str],
    max_gen_len: int,
    echo: bool,
    logprobs: bool,
) -> None:
    arguments: Any = (prompts, -1.5, 0.9, max_gen_len, logprobs, echo)
    assert_equal(connected.text_completion(*arguments), built.text_completion(*arguments))


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("max_gen_len", [0, 12])
@pytest.mark.parametrize("dialogs", [[], [DIALOG, TAGGED, DIALOG]])
def test_chat_completion_is_the_same(
    built: Llama, connected: RemoteLlama, dialogs: Any, max_gen_len: int, logprobs: bool
) -> None:
    arguments: Any = (dialogs, 0, 0.9, max_gen_len, logprobs)
    assert_equal(connected.chat_completion(*arguments), built.chat_completion(*arguments))


def test_more_prompts_than_a_request_may_hold_are_several_requests(
    built: Llama, connected: RemoteLlama
) -> None:
    prompts = [[1, 100 + index] for index in range(130)]
    assert connected.generate(prompts, 2, 0.0) == built.generate(prompts, 2, 0.0)
    texts = [f"{index}" for index in range(70)]
    assert connected.text_completion(texts, 0, 1, 2) == built.text_completion(texts, 0, 1, 2)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("generate", ([[1]], -1)),
        ("generate", ([[1]], 2**32)),
        ("generate", ([[1, -1]], 5)),
        ("generate", ([[1]] * 70 + [[1, 2, 560]], 5)),
        ("generate", ([[1]] * 70 + [[1] * 257], 5)),
        ("generate", ([[1, 2**32]], 5)),
        ("generate", ([[]], 5)),
        ("generate", ([], 5, float("nan"), 1.0000001)),
        ("text_completion", (["hi"], 100.00001)),
        ("text_completion", ("hi",)),
        ("text_completion", (["a\ud800"],)),
        ("text_completion", (["a"] * 65 + ["long " * 300],)),
        ("chat_completion", ([DIALOG, [*DIALOG, *DIALOG]],)),
        ("chat_completion", ([[{"role": "user", "content": None}]],)),
        ("chat_completion", ([[{"role": "user", "content": "long " * 300}]],)),
        ("chat_completion", ([DIALOG], None, None)),
    ],
)
def test_what_is_refused_is_refused_with_the_same_words(
    built: Llama, connected: RemoteLlama, method: str, arguments: Any
) -> None:
    with pytest.raises(ValueError, match=": ") as in_process:
        getattr(built, method)(*arguments)
    with pytest.raises(ValueError, match=": ") as over_grpc:
        getattr(connected, method)(*arguments)
    assert str(over_grpc.value) == str(in_process.value)


@pytest.mark.parametrize(
    "sampling",
    [{"top_p": 1.0000001}, {"temperature": float("nan")}, {"temperature": 100.00001, "top_p": 2}],
)
def test_gateway_model_service_and_library_say_the_same(
    stack: Stack, built: Llama, sampling: Any
) -> None:
    with pytest.raises(ValueError, match="must be") as refused:
        built.generate([[1]], 5, **sampling)
    words = str(refused.value)
    with Client(stack.gateway.address) as client, pytest.raises(InvalidRequestError) as by_gateway:
        client.complete([1], **sampling)
    assert str(by_gateway.value).replace("sampling.", "") == words
    with grpc.insecure_channel(stack.model.address) as channel:
        wire = sampling_pb2.SamplingParams(seed=1, **sampling)
        start = model_pb2.StartSequence(sequence_id="a", prompt_ids=[1], sampling=wire)
        requests = iter([model_pb2.GenerateRequest(start=start)])
        [event] = next(model_pb2_grpc.ModelServiceStub(channel).Generate(requests)).events
    assert event.error.message.replace("start.sampling.", "") == words


def test_a_key_is_told_how_many_prompts_its_own_quota_takes(
    gateway_beside: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"key of ada").hexdigest()
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "ada"\nsha256 = "{digest}"\nmax_sequences = 3\n')
    with Client(gateway_beside(api_keys=keys).address, api_key="key of ada") as client:
        limits = client.get_model().limits
        assert (limits.max_dialogs, limits.max_sequences) == (3, 3)
        client.complete_many(["a"] * 3, max_gen_len=1)
        with pytest.raises(InvalidRequestError, match="at most 3 entries"):
            client.complete_many(["a"] * 4, max_gen_len=1)


def test_an_answer_may_be_larger_than_a_unary_one(
    built: Llama, gateway_beside: Callable[..., ServiceProcess]
) -> None:
    arguments: Any = {"max_gen_len": 60, "temperature": 0, "logprobs": True}
    address = gateway_beside(max_response_bytes=1024).address
    with Client(address) as client, pytest.raises(InvalidRequestError, match="logprobs"):
        client.complete("The", **arguments)
    with Llama.connect(address) as connected:
        answer = connected.text_completion(["The"], **arguments)
    assert_equal(answer, built.text_completion(["The"], **arguments))
