"""Asks one question and prints the answer while it is generated, with the generated stubs alone.

python examples/python/stubs.py "What do llamas eat?" [host:port]

chat.py does the same with the Python client, which adds types and readable errors.
"""

import sys

import grpc

from llama.v1 import chat_pb2, chat_pb2_grpc, sampling_pb2


def main(question: str = "What do llamas eat?", target: str = "127.0.0.1:50051") -> None:
    user = chat_pb2.Message(role=chat_pb2.ROLE_USER, content=question)
    request = chat_pb2.ChatCompleteStreamRequest(
        dialogs=[chat_pb2.Dialog(messages=[user])],
        sampling=sampling_pb2.SamplingParams(temperature=0),
    )
    # Without this option gRPC would use an http_proxy of the environment even for this machine.
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        for response in chat_pb2_grpc.ChatServiceStub(channel).ChatCompleteStream(request):
            print(response.event.delta.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
