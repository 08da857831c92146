"""What the synchronous and the asyncio client have in common below their methods."""

DEFAULT_TARGET = "127.0.0.1:50051"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Tokens with their alternatives outgrow gRPC's 4 MiB; the gateway limits what one may ask for.
    ("grpc.max_receive_message_length", -1),
    # A server that vanished without a word is noticed within half a minute, also mid-stream.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # After a restart of the server the next call finds it: gRPC's own bound is two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_LOOPBACK = ("127.", "localhost:", "[::1]:")


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """Channel options; an `http_proxy` in the environment is not asked for this machine itself."""
    if target.startswith(_LOOPBACK):
        return (*_OPTIONS, ("grpc.enable_http_proxy", 0))
    return _OPTIONS
