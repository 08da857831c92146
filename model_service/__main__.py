"""`python -m model_service`: one rank, or with --shards the launcher of several."""

import sys

import serving

with serving.needs_extra("model"):
    from model_service.launcher import is_rank, launch
    from model_service.settings import ModelSettings
    from serving.errors import StartError
    from serving.process import configure
    from serving.telemetry.logs import exit_with_error


def main() -> None:
    settings = configure(ModelSettings, prog="python -m model_service")
    if is_rank() or settings.shards in (None, 1):
        # Only here, because a launcher and --help need no PyTorch, which takes a second to import.
        with serving.needs_extra("model"):
            from model_service.rank import run  # noqa: PLC0415
        run(settings)
        return
    try:
        status = launch([sys.executable, "-m", "model_service", *sys.argv[1:]], settings.shards)
    except StartError as error:
        exit_with_error(str(error))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
