"""The tokenizer service's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from serving.settings import Port, ServerSettings


class TokenizerSettings(ServerSettings):
    """Serves llama.v1.TokenizerService: text to token ids and back."""

    port: Port = 50052
    tokenizer_path: Annotated[
        Path,
        Field(
            description="the model's tokenizer.model (SentencePiece), tokenizer.json or GGUF file, "
            "or a folder with one of them"
        ),
    ]
