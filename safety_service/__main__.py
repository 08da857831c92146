"""`python -m safety_service`: a classifier by rules, or by a Llama Guard that a gateway serves."""

import serving

with serving.needs_extra("safety"):
    from safety_service.llama_guard import LlamaGuard, read_policy
    from safety_service.rules import Rules
    from safety_service.server import safety_service
    from safety_service.settings import SafetySettings
    from serving.process import configure, run
    from serving.server import serve


async def start(settings: SafetySettings) -> None:
    if settings.guard_target is not None and settings.classifier == "llama-guard":
        guard = LlamaGuard(settings.guard_target, read_policy(settings.guard_policy))
        await serve(settings, safety_service(guard, guard.run))
    else:
        await serve(settings, safety_service(Rules.read(settings.rules)))


def main() -> None:
    run(start(configure(SafetySettings, prog="python -m safety_service")))


if __name__ == "__main__":
    main()
