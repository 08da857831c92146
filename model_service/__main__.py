"""`python -m model_service`, or under torchrun one process per shard."""

from model_service.settings import ModelSettings
from serving.logs import configure
from serving.settings import parse


def main() -> None:
    settings = parse(ModelSettings, "python -m model_service")
    configure(settings)
    # Importing PyTorch takes more than a second: wrong settings and --help are told before that.
    from model_service.rank import run  # noqa: PLC0415

    run(settings)


if __name__ == "__main__":
    main()
