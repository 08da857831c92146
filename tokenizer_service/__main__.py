"""`python -m tokenizer_service --tokenizer_path FILE`."""

import asyncio
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import Field

import serving  # noqa: F401  # before grpc
from serving.process import return_freed_memory
from serving.server import serve
from serving.settings import Port, ServerSettings, parse
from serving.telemetry import logs
from tokenizer_service.server import tokenizer_service
from tokenizer_service.tokenizer import Tokenizer, TokenizerFileError


class TokenizerSettings(ServerSettings):
    """Serves llama.v1.TokenizerService: text to token ids and back, by SentencePiece."""

    port: Port = 50052
    tokenizer_path: Annotated[Path, Field(description="SentencePiece model file, tokenizer.model")]


def main() -> None:
    settings = parse(TokenizerSettings, prog="python -m tokenizer_service")
    logs.configure(settings)
    return_freed_memory()
    try:
        tokenizer = Tokenizer(settings.tokenizer_path)
    except TokenizerFileError as error:
        logs.exit_with_error(str(error))
    log = structlog.stdlib.get_logger("tokenizer_service")
    log.info("tokenizer loaded", pieces=tokenizer.n_words, fingerprint=tokenizer.fingerprint)
    asyncio.run(serve(settings, tokenizer_service(tokenizer)))


if __name__ == "__main__":
    main()
