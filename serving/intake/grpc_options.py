"""Options of a server's gRPC core that limit the cost of connections from untrusted clients.

A connection holds a file descriptor from its first packet on, before the server knows anything
about the client. The limit on connections therefore leaves descriptors for the server's own files
and upstreams, and there is a limit on the time for a handshake.
"""

import math
import resource

from serving.settings import ServerSettings

# For the server's files, its connections to other services, and the files of libraries.
RESERVED_FILES = 256
# The share of connections that a process's HTTP port gets beside gRPC's.
FRONT_SHARE = 1 / 8
# For TLS and HTTP/2 settings together; gRPC's own limit is two minutes.
HANDSHAKE_MS = 10_000
# Between a soft and a hard limit gRPC refuses calls at random, so both are the same.
METADATA_BYTES = 16 * 1024
# Calls that have not reached Python yet. From 1,000 on gRPC would by default cancel some at random,
# with a status that tells a client nothing; a service refuses them with a reason.
MAX_PENDING_CALLS = 20_000

Option = tuple[str, int]


def server_options(settings: ServerSettings, *, has_front: bool = False) -> list[Option]:
    """The options; also raises the process's soft limit of open files to the hard one.

    `has_front`: whether the process has an HTTP port beside gRPC's, which shares its open files.
    """
    return [
        # Otherwise a second server on the same port would start and get some of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        (
            "grpc.max_allowed_incoming_connections",
            max_connections(settings, 1 - FRONT_SHARE if has_front else 1),
        ),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # From the first packet, and again from the end of the last call; pings do not count.
        ("grpc.max_connection_idle_ms", math.ceil(settings.max_connection_idle * 1000)),
        # Clients may ping every 10 seconds; half of that tolerates pings that arrive late or early.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # The resources of a client that vanished are freed within 40 seconds.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def max_connections(settings: ServerSettings, share: float) -> int:
    """The connections that a port may have at once, which gets a share of the open files."""
    return settings.max_connections or int(_files_for_connections() * share)


def _files_for_connections() -> int:
    """The number of connections that the limit of open files allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = 2**31 - 1 if hard == resource.RLIM_INFINITY else hard
    return max(files - RESERVED_FILES, files // 2)
