"""`python -m gateway`: the public server, in front of a tokenizer service and model replicas."""

import asyncio

from gateway.backend import Backend
from gateway.server import gateway_service
from gateway.settings import GatewaySettings
from serving import logs
from serving.server import serve
from serving.settings import parse


async def run(settings: GatewaySettings) -> None:
    backend = Backend(
        settings.tokenizer_target, settings.model_target_list, settings.safety_options
    )
    await serve(settings, gateway_service(backend, settings))


def main() -> None:
    settings = parse(GatewaySettings, prog="python -m gateway")
    logs.configure(settings)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
