"""Gateways that are gone while the command waits for them: killed, or without an answer."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chasqui.flags import with_advice
from client import Client, StreamLostError
from tests.command import Run, Spawn

# A gateway that answers with one word, and then nothing more.
GATEWAY = """
import threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from llama.v1 import chat_pb2
from tests.scripted_gateway import chat_event, handler

def answer(request, context):
    context.send_initial_metadata((("x-request-id", "abc"),))
    yield chat_event(1, started=chat_pb2.Started())
    yield chat_event(2, delta=chat_pb2.Delta(text="word"))
    threading.Event().wait()

server = grpc.server(ThreadPoolExecutor(4))
methods = {
    "ChatCompleteStream": handler("ChatCompleteStream", answer),
    "GetModel": handler("GetModel", lambda request, context: chat_pb2.GetModelResponse()),
}
service = grpc.method_handlers_generic_handler("llama.v1.ChatService", methods)
server.add_generic_rpc_handlers((service,))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""
ADVICE = "Start the services with `chasqui serve`, or name another address with --target."


@pytest.fixture
def gateway() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [sys.executable, "-c", GATEWAY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def read_until(terminal: int, end: str) -> str:
    shown = ""
    while end not in shown:
        shown += os.read(terminal, 1024).decode()
    return shown


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_an_answer_whose_gateway_is_killed_says_at_once_that_it_tries_again(
    spawn: Spawn, gateway: tuple["subprocess.Popen[str]", str]
) -> None:
    process, target = gateway
    with spawn("chat", "--target", target, "--ask", "Hello") as chat:
        assert chat.stdout is not None
        assert chat.stderr is not None
        assert chat.stdout.read(4) == "word"
        process.kill()
        warning = chat.stderr.readline()
        chat.send_signal(signal.SIGINT)
        stdout, stderr = chat.communicate(timeout=60)
    assert warning.startswith(f"(the connection to {target} broke (")
    assert warning.endswith("); trying for up to 30 seconds to continue the answer)\n")
    assert (stdout, stderr) == ("\n", "(stopped)\n")


def test_a_lost_answer_ends_with_the_address_and_what_to_do(
    gateway: tuple["subprocess.Popen[str]", str],
) -> None:
    process, target = gateway
    with Client(target, resume_seconds=0.2) as client:
        stream = client.chat_stream([{"role": "user", "content": "Hello"}])
        next(stream)
        process.kill()
        with pytest.raises(StreamLostError) as lost:
            list(stream)
    text = with_advice(lost.value)
    assert f"could not be resumed within 0.2 seconds (nothing answers at {target} (" in text
    assert text.endswith(f". {ADVICE}")


def test_a_question_to_a_gateway_that_was_killed_is_answered_with_what_to_do(
    spawn: Spawn, gateway: tuple["subprocess.Popen[str]", str]
) -> None:
    process, target = gateway
    terminal, inside = os.openpty()
    with spawn("chat", "--target", target, stdin=inside, stdout=inside, stderr=inside) as chat:
        read_until(terminal, "> ")
        process.kill()
        process.wait()
        os.write(terminal, b"Hello\n")
        shown = read_until(terminal, ADVICE)
        os.write(terminal, b"/quit\n")
        assert chat.wait(timeout=60) == 0
    os.close(terminal)
    os.close(inside)
    assert f"Error: nothing answers at {target} (" in shown


def test_status_names_its_own_timeout_when_it_passes(run: Run) -> None:
    with silent_server() as target:
        done = run("status", "--target", target, "--timeout=0.2")
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: the gateway at {target} did not send its status within 0.2 seconds, the --timeout "
        "of this command\n"
    )
