"""What connections may cost a server, whoever is at their other end.

Each connection holds a file descriptor from its first packet on, before anything is known about
it: hence the bound on connections, which leaves descriptors for the server's own files and
upstreams, and the bound on the time to complete a handshake.
"""

import math
import resource

from serving.settings import ServerSettings

# For files, the connections to other services, and what libraries open.
RESERVED_FILES = 256
# TLS and HTTP/2 settings together; gRPC's own bound is two minutes.
HANDSHAKE_MS = 10_000
# gRPC refuses calls at random between a soft limit and a hard one; equal, they are one rule.
METADATA_BYTES = 16 * 1024
# Calls that Python has not seen yet. From 1,000 on gRPC would drop some at random, and say
# CANCELLED, which tells a client nothing; a service refuses them with a reason.
MAX_UNSEEN_CALLS = 20_000

Option = tuple[str, int]


def server_options(settings: ServerSettings) -> list[Option]:
    """The options of a server's gRPC core. Raises the process's limit of open files to its most."""
    return [
        # Without this a second server on the same port would start, and share its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.server.max_pending_requests", MAX_UNSEEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN_CALLS),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections or _room_for_files()),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # From its first packet on, and again from the end of its last call. Pings do not count.
        ("grpc.max_connection_idle_ms", math.ceil(settings.max_connection_idle * 1000)),
        # Clients may ping every 10 seconds; half of it leaves room for late and early ones.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that vanished without a word frees what it holds within 40 seconds.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _room_for_files() -> int:
    """Connections that the limit of open files leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = 2**31 - 1 if hard == resource.RLIM_INFINITY else hard
    return max(most - RESERVED_FILES, most // 2)
