"""`python -m tokenizer_service` as its operator meets it: signals, exit status, messages."""

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from llama.v1.sampling_pb2 import TokenIds
from llama.v1.tokenizer_pb2 import DecodeRequest, EncodeRequest
from llama.v1.tokenizer_pb2_grpc import TokenizerServiceStub

# Takes much longer than a signal takes to arrive, and the answer is short: gRPC may reset the
# connection of a server that ends while a client still reads megabytes.
BOS = 1
LONG_REQUEST = DecodeRequest(sequences=[TokenIds(ids=[BOS] * 24_000_000)])
SIZE = str(LONG_REQUEST.ByteSize())
ROOM_FOR_IT = ("--max_request_bytes", SIZE, "--max_request_fields", SIZE)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_running_call_finish(
    launch: Any, begin: Any, model_path: Path, signum: signal.Signals
) -> None:
    process = launch("--tokenizer_path", model_path, "--port", "0", *ROOM_FOR_IT)
    with grpc.insecure_channel(process.wait_for("listening")["address"]) as channel:
        decoding = begin(channel, LONG_REQUEST)
        process.popen.send_signal(signum)
        assert list(next(decoding).texts) == [""]
        assert decoding.code() is grpc.StatusCode.OK
    assert process.wait() == 0
    events = [line["event"] for line in process.lines]
    assert events[-4:] == ["draining", "health changed", "call finished", "stopped"]


def test_watch_tells_of_the_drain(launch: Any, model_path: Path) -> None:
    process = launch("--tokenizer_path", model_path, "--port", "0")
    with grpc.insecure_channel(process.wait_for("listening")["address"]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(HealthCheckRequest(service="llama.v1.TokenizerService"))
        assert next(watch).status == HealthCheckResponse.SERVING
        process.popen.terminate()
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        assert watch.code() is grpc.StatusCode.UNAVAILABLE
    assert process.wait() == 0


def test_second_signal_ends_the_process_at_once(launch: Any, begin: Any, model_path: Path) -> None:
    process = launch("--tokenizer_path", model_path, "--port", "0", *ROOM_FOR_IT)
    with grpc.insecure_channel(process.wait_for("listening")["address"]) as channel:
        decoding = begin(channel, LONG_REQUEST)
        process.popen.terminate()
        process.wait_for("draining")
        process.popen.terminate()
        assert process.wait() == -signal.SIGTERM
        assert decoding.code() is grpc.StatusCode.UNAVAILABLE


def test_request_id_is_in_the_answer_and_in_the_log(launch: Any, model_path: Path) -> None:
    process = launch(CHASQUI_TOKENIZER_PATH=str(model_path), CHASQUI_PORT="0")
    with grpc.insecure_channel(process.wait_for("listening")["address"]) as channel:
        encode = TokenizerServiceStub(channel).Encode
        _, call = encode.with_call(EncodeRequest(), metadata=(("x-request-id", "abc"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "abc"
    assert process.wait_for("call finished")["request_id"] == "abc"


def test_failed_handshake_writes_no_raw_line(
    launch: Any, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    authority = trustme.CA()
    pair = tmp_path / "pair.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pair)
    tls = ("--tls_cert", pair, "--tls_key", pair)
    process = launch("--tokenizer_path", model_path, "--port", "0", *tls)
    host, _, port = process.wait_for("listening")["address"].rpartition(":")
    with socket.create_connection((host, int(port)), 30) as plaintext:
        plaintext.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while plaintext.recv(4096):
            pass
    process.popen.terminate()
    assert process.wait() == 0  # every line was one of the log's own


def test_help_lists_flags_and_variables() -> None:
    command = [sys.executable, "-m", "tokenizer_service", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert text.startswith("usage: python -m tokenizer_service")
    assert "or a folder with one of them (required) [env: CHASQUI_TOKENIZER_PATH]" in text
    assert "(default: 50052) [env: CHASQUI_PORT]" in text


def test_missing_model_file_is_one_line_and_status_1(launch: Any, tmp_path: Path) -> None:
    missing = tmp_path / "tokenizer.model"
    process = launch("--tokenizer_path", missing)
    assert process.wait() == 1
    (line,) = process.lines
    assert line["event"] == (
        f"cannot read {missing}: No such file or directory; tokenizer_path must name the "
        "tokenizer that came with the checkpoint: a tokenizer.model, a tokenizer.json, a GGUF "
        "file, or a folder with one of them"
    )


def test_taken_port_is_one_line_and_status_1(launch: Any, model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = launch("--tokenizer_path", model_path, "--port", port)
        assert process.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already" in process.lines[-1]["event"]


def test_missing_flag_is_one_line_and_status_2() -> None:
    command = [sys.executable, "-m", "tokenizer_service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "python -m tokenizer_service: error: "
        "--tokenizer_path (or CHASQUI_TOKENIZER_PATH) is required\n"
    )


def test_service_needs_no_torch() -> None:
    program = "import sys, tokenizer_service.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
