"""The messages of a SentencePiece model file, as far as they are read or written here.

The module that sentencepiece generates from its sentencepiece_model.proto needs another version of
protobuf. Fields that are not listed here are kept when a model is parsed and serialized again.
"""

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

# SentencePiece.Type; GGUF has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2  # TrainerSpec.ModelType

_PACKAGE = "chasqui.sentencepiece"
_FIELDS = {
    "ModelProto": {
        "pieces": (1, "repeated SentencePiece"),
        "trainer_spec": (2, "TrainerSpec"),
        "normalizer_spec": (3, "NormalizerSpec"),
    },
    "SentencePiece": {"piece": (1, "string"), "score": (2, "float"), "type": (3, "int32")},
    "TrainerSpec": {
        "model_type": (3, "int32"),
        "byte_fallback": (35, "bool"),
    },
    "NormalizerSpec": {
        "name": (1, "string"),
        "precompiled_charsmap": (2, "bytes"),
        "add_dummy_prefix": (3, "bool"),
        "remove_extra_whitespaces": (4, "bool"),
    },
}


def parse_model(serialized: bytes) -> Any:  # noqa: ANN401  # a class made at run time
    """The ModelProto of a model file; DecodeError if it is none."""
    return _MODEL.FromString(serialized)


def serialize_model(
    pieces: Iterable[tuple[str, float, int]], *, dummy_prefix: bool, removes_spaces: bool = False
) -> bytes:
    """A model of byte-pair encoding that keeps texts as they are.

    Args:
        pieces: the text, score and type of each id.
        dummy_prefix: whether encoding puts a space in front of a text.
        removes_spaces: whether encoding removes all but one of several spaces.
    """
    model = _MODEL()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.byte_fallback = any(each.type == BYTE for each in model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = removes_spaces
    serialized: bytes = model.SerializeToString()
    return serialized


def _model_class() -> type[Message]:
    file = FileDescriptorProto(name="chasqui/sentencepiece.proto", package=_PACKAGE)
    for name, fields in _FIELDS.items():
        message = DescriptorProto(name=name)
        for field, (number, kind) in fields.items():
            message.field.append(_field(field, number, kind))
        file.message_type.append(message)
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelProto"))


def _field(name: str, number: int, kind: str) -> FieldDescriptorProto:
    label, _, type_name = kind.rpartition(" ")
    field = FieldDescriptorProto(name=name, number=number)
    field.label = getattr(FieldDescriptorProto, f"LABEL_{(label or 'optional').upper()}")
    if type_name in _FIELDS:
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{type_name}"
    else:
        field.type = getattr(FieldDescriptorProto, f"TYPE_{type_name.upper()}")
    return field


_MODEL: Any = _model_class()
