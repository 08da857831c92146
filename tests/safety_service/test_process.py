"""`python -m safety_service`: its contract on the wire, and what wrong settings are told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from llama.v1.chat_pb2 import ROLE_ASSISTANT, ROLE_USER, Dialog, Message
from llama.v1.safety_pb2 import VERDICT_SAFE, VERDICT_UNSAFE, ClassifyRequest
from llama.v1.safety_pb2_grpc import SafetyServiceStub


def test_dialogs_and_texts_are_judged_and_health_is_told(target: str) -> None:
    said = [Message(role=ROLE_USER, content="Hi"), Message(role=ROLE_ASSISTANT, content="csam")]
    with grpc.insecure_channel(target) as channel:
        stub = SafetyServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        judged = stub.Classify(ClassifyRequest(dialog=Dialog(messages=said)))
        assert judged.verdict == VERDICT_UNSAFE
        assert list(judged.categories) == ["child_sexual_abuse"]
        assert stub.Classify(ClassifyRequest(text="Hello")).verdict == VERDICT_SAFE
        state = health.Check(HealthCheckRequest(service="llama.v1.SafetyService"))
        assert state.status == HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("request_message", "problem"),
    [
        (ClassifyRequest(), "content: must be a dialog or a text"),
        (ClassifyRequest(dialog=Dialog()), "dialog.messages: must not be empty"),
        (
            ClassifyRequest(dialog=Dialog(messages=[Message(content="secret")])),
            "dialog.messages[0].role: must be system, user or assistant",
        ),
    ],
)
def test_wrong_request_is_refused_by_field(
    target: str, request_message: ClassifyRequest, problem: str
) -> None:
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as error:
        SafetyServiceStub(channel).Classify(request_message)
    refused: Any = error.value
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == problem


def test_wrong_rules_end_the_start_with_one_line(launch: Any, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("[x]\npatterns = ['(']")
    process = launch("--rules", path)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert f"{path}: x.patterns.0: " in json.loads(errors.splitlines()[-1])["event"]


def test_llama_guard_without_a_target_is_a_wrong_setting(launch: Any) -> None:
    process = launch("--classifier=llama-guard")
    assert process.communicate()[1].startswith(
        "python -m safety_service: error: --classifier=llama-guard needs --guard_target"
    )
    assert process.returncode == 2


def test_service_needs_no_torch_and_no_tokenizer() -> None:
    program = (
        "import sys, safety_service.__main__;"
        "sys.exit(bool({'torch', 'sentencepiece', 'numpy'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
