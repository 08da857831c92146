"""The gateway as a process: what it imports, and what it says about its settings."""

import subprocess
import sys

import pytest

from gateway.settings import GatewaySettings


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_gateway_never_imports_torch_or_sentencepiece() -> None:
    heavy = ["torch", "fairscale", "sentencepiece", "numpy"]
    code = f"import gateway.__main__, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


def test_text_modules_can_be_used_without_protocol_buffers() -> None:
    code = (
        "import gateway.text.detokenizer, gateway.text.stop_strings, sys;"
        "print([m for m in ('grpc', 'google.protobuf') if m in sys.modules])"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_help_lists_every_flag_with_its_variable() -> None:
    told = run("-m", "gateway", "--help").stdout
    for name in GatewaySettings.model_fields:
        assert f"--{name} " in told
        assert f"CHASQUI_{name.upper()}" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_targets", "a:1,,b:2"], "--model_targets (or CHASQUI_MODEL_TARGETS): "),
        (["--replica_hang_timeout", "inf"], "less than or equal to 1000000000"),
        (["--safety_timeout", "1e10"], "less than or equal to 1000000000"),
        (
            ["--max_dialogs", "9", "--max_queued_sequences", "8"],
            "--max_dialogs (9) must not be above --max_queued_sequences (8): a full request "
            "would never be admitted",
        ),
    ],
)
def test_wrong_setting_is_one_readable_line(flags: list[str], message: str) -> None:
    result = run("-m", "gateway", *flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
