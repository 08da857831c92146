"""The tokenizer service's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from serving.settings import Port, ServerSettings


class TokenizerSettings(ServerSettings):
    """Serves llama.v1.TokenizerService: text to token ids and back, by SentencePiece."""

    port: Port = 50052
    tokenizer_path: Annotated[Path, Field(description="SentencePiece model file, tokenizer.model")]
