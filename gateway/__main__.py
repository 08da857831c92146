"""`python -m gateway`: the public server, in front of a tokenizer service and model replicas."""

import asyncio

import serving  # noqa: F401  # before grpc
from gateway.rpc.upstreams import Backend
from gateway.server import gateway_service
from gateway.settings import GatewaySettings
from gateway.upstream.connect import connector
from serving.errors import StartError
from serving.process import return_freed_memory
from serving.server import serve
from serving.settings import parse
from serving.telemetry import logs


async def run(settings: GatewaySettings) -> None:
    backend = Backend(
        settings.tokenizer_target,
        settings.model_target_list,
        settings.pool_options,
        connector(settings),
        settings.safety_options,
    )
    await serve(settings, gateway_service(backend, settings))


def main() -> None:
    settings = parse(GatewaySettings, prog="python -m gateway")
    logs.configure(settings)
    return_freed_memory()
    try:
        asyncio.run(run(settings))
    except StartError as error:
        logs.exit_with_error(str(error))


if __name__ == "__main__":
    main()
