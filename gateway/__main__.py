"""`python -m gateway`: the public server, in front of a tokenizer service and model replicas."""

import serving

with serving.needs_extra("gateway"):
    from gateway.rpc.upstreams import Backend
    from gateway.server import gateway_service
    from gateway.settings import GatewaySettings
    from gateway.upstream.connect import connector
    from serving.process import configure, run
    from serving.server import serve


async def start(settings: GatewaySettings) -> None:
    backend = Backend(
        settings.tokenizer_target,
        settings.model_target_list,
        settings.pool_options,
        connector(settings.upstream_tls, settings.upstream_name),
        safety=settings.safety_options,
        prompt_format=settings.prompt_format,
    )
    await serve(settings, gateway_service(backend, settings))


def main() -> None:
    run(start(configure(GatewaySettings, prog="python -m gateway")))


if __name__ == "__main__":
    main()
