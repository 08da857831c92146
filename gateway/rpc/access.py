"""Permissions of the gateway's services, and how long a connection lasts."""

from pathlib import Path

from llama.v1 import chat_pb2, operator_pb2
from serving.intake.grpc_options import Option
from serving.intake.interceptor import Authorize
from serving.security.caller import Permission
from serving.security.keys import KeyRing

_NEEDS: dict[str, Permission] = {
    chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name: "generate",
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name: "operate",
}


def authorizer(api_keys: Path | None) -> Authorize | None:
    """The check of the API keys in a file; None without one. StartError if it is invalid."""
    return None if api_keys is None else KeyRing(api_keys, _NEEDS).authorize


def connection_options(max_age: float | None, grace_period: float) -> list[Option]:
    """Options of gRPC for the connections of clients; times in seconds, None for no limit."""
    if max_age is None:
        return []
    return [
        ("grpc.max_connection_age_ms", round(max_age * 1000)),
        ("grpc.max_connection_age_grace_ms", round(grace_period * 1000)),
    ]
