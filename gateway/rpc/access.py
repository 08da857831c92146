"""Permissions of the gateway's services, and how long a connection lasts."""

from gateway.settings import GatewaySettings
from llama.v1 import chat_pb2, operator_pb2
from serving.intake.grpc_options import Option
from serving.intake.interceptor import Authorize
from serving.security.caller import Permission
from serving.security.keys import KeyRing

_NEEDS: dict[str, Permission] = {
    chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name: "generate",
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name: "operate",
}


def authorizer(settings: GatewaySettings) -> Authorize | None:
    """The check of API keys; None if none are configured. StartError if their file is invalid."""
    return None if settings.api_keys is None else KeyRing(settings.api_keys, _NEEDS).authorize


def connection_options(settings: GatewaySettings) -> list[Option]:
    """Options of gRPC for the connections of clients."""
    if settings.max_connection_age is None:
        return []
    return [
        ("grpc.max_connection_age_ms", round(settings.max_connection_age * 1000)),
        ("grpc.max_connection_age_grace_ms", round(settings.grace_period * 1000)),
    ]
