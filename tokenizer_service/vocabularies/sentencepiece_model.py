"""A vocabulary of SentencePiece: Llama 2's `tokenizer.model`, or one made of a GGUF file."""

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor

from llama.model_files import ModelFileError
from llama.v1.tokenizer_pb2 import (
    PIECE_KIND_BYTE,
    PIECE_KIND_CONTROL,
    PIECE_KIND_NORMAL,
    PIECE_KIND_UNKNOWN,
    Piece,
)
from tokenizer_service.vocabularies.control_names import is_control_name
from tokenizer_service.vocabularies.sentencepiece_proto import (
    CONTROL,
    USER_DEFINED,
    parse_model,
)

SPACE_SYMBOL = "\u2581"  # stands for a space inside of a piece


class SentencePieceVocabulary:
    """A SentencePiece model. Its processor may be used from several threads."""

    byte_level = False

    def __init__(self, model: bytes) -> None:
        """Reads a serialized model, or raises ValueError."""
        self._processor = SentencePieceProcessor()
        try:
            model = _with_control_tokens(model)
            self._processor.LoadFromSerializedProto(model)
        except (DecodeError, RuntimeError) as error:
            raise ValueError(str(error)) from error
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        self.dummy_prefix = self._processor.Normalize("a") == SPACE_SYMBOL + "a"
        self.pieces = [self._piece(token_id) for token_id in range(len(self._processor))]
        self.max_token_bytes = self._max_token_bytes() if _keeps_text(model) else None

    def _max_token_bytes(self) -> int | None:
        """The symbol for a space counts three bytes, because it also stands for itself."""
        # Without byte pieces, an unknown token stands for a run of characters of any length.
        ids = range(len(self.pieces))
        if not any(map(self._processor.IsByte, ids)):
            return None
        return max(
            len(self._processor.IdToPiece(token_id).encode())
            for token_id in ids
            if not (self._processor.IsControl(token_id) or self._processor.IsByte(token_id))
        )

    def encode(self, text: str, after: str) -> list[int]:  # noqa: ARG002
        """The ids of a text, with a space in front of it behind a control token, too.

        llama.cpp does the same, and so does the normalizer that transformers makes of such a model.
        """
        ids: list[int] = self._processor.Encode(text.encode())
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.Decode(ids)
        return text

    def _piece(self, token_id: int) -> Piece:
        written: str = self._processor.IdToPiece(token_id)
        if self._processor.IsControl(token_id):
            return Piece(kind=PIECE_KIND_CONTROL, name=written)
        if self._processor.IsByte(token_id):  # written as <0x0A>
            return Piece(bytes=bytes([int(written[1:-1], 16)]), kind=PIECE_KIND_BYTE)
        if self._processor.IsUnknown(token_id):
            return Piece(bytes=self.decode([token_id]).encode(), kind=PIECE_KIND_UNKNOWN)
        return Piece(bytes=written.replace(SPACE_SYMBOL, " ").encode(), kind=PIECE_KIND_NORMAL)


def read_sentencepiece(model: bytes, path: object) -> SentencePieceVocabulary:
    """The vocabulary of the model file `path`, or a ModelFileError that names it."""
    try:
        vocabulary = SentencePieceVocabulary(model)
    except ValueError as error:
        if _is_tiktoken(model):
            raise ModelFileError(
                f"{path} is Llama 3's tokenizer.model, a list of tokens for tiktoken; use the "
                "tokenizer.json that came with the checkpoint"
            ) from error
        raise ModelFileError(
            f"{path} is damaged or not a SentencePiece model; use the tokenizer.model that came "
            "with the checkpoint, or its tokenizer.json"
        ) from error
    if vocabulary.bos_id < 0 or vocabulary.eos_id < 0:
        raise ModelFileError(
            f"{path} is a SentencePiece model without BOS or EOS, so not one of Llama 2; use the "
            "tokenizer.model that came with the checkpoint"
        )
    return vocabulary


def _with_control_tokens(model: bytes) -> bytes:
    """The model with its control tokens marked as such.

    Some models define names like `<|im_start|>` as pieces that encoding finds in any text.
    """
    proto = parse_model(model)
    unmarked = [
        piece
        for piece in proto.pieces
        if piece.type == USER_DEFINED and is_control_name(piece.piece)
    ]
    for piece in unmarked:
        piece.type = CONTROL
    return bytes(proto.SerializeToString()) if unmarked else model


def _keeps_text(model: bytes) -> bool:
    """Whether the model's normalizer changes nothing in a text but spaces, to their symbol."""
    normalizer = parse_model(model).normalizer_spec
    # SentencePiece removes extra white space by default.
    removes = normalizer.remove_extra_whitespaces
    removes = removes or not normalizer.HasField("remove_extra_whitespaces")
    return not normalizer.precompiled_charsmap and not removes


def _is_tiktoken(model: bytes) -> bool:
    """Whether lines begin with a token in base64 and its rank, such as `IQ== 0`."""
    token, _, rank = model.partition(b"\n")[0].partition(b" ")
    return rank.isdigit() and token.endswith(b"=")
