"""`python -m tokenizer_service --tokenizer_path PATH`: text to token ids and back."""

import serving

with serving.needs_extra("tokenizer"):
    import structlog

    from llama.model_files import ModelFileError
    from serving.errors import StartError
    from serving.process import configure, run
    from serving.server import serve
    from tokenizer_service.open_tokenizer import open_tokenizer
    from tokenizer_service.server import tokenizer_service
    from tokenizer_service.settings import TokenizerSettings


async def start(settings: TokenizerSettings) -> None:
    try:
        tokenizer = open_tokenizer(settings.tokenizer_path)
    except ModelFileError as error:
        raise StartError(str(error)) from error
    log = structlog.stdlib.get_logger("tokenizer_service")
    log.info("tokenizer loaded", pieces=tokenizer.n_words, fingerprint=tokenizer.fingerprint)
    await serve(settings, tokenizer_service(tokenizer))


def main() -> None:
    run(start(configure(TokenizerSettings, prog="python -m tokenizer_service")))


if __name__ == "__main__":
    main()
