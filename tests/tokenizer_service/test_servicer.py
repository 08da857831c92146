"""TokenizerService over gRPC."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llama.v1.sampling_pb2 import TokenIds
from llama.v1.tokenizer_pb2 import (
    DecodeRequest,
    EncodeRequest,
    GetVocabularyRequest,
    Segment,
)
from llama.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from tests.error_details import violations
from tests.tokenizer_service.forms import llama_gguf, llama_tokenizer_json
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.server import MAX_BYTES_AT_ONCE, TokenizerServicer
from tokenizer_service.tokenizer import Tokenizer

SERVICE = "llama.v1.TokenizerService"


@given(st.lists(st.tuples(st.text(), st.booleans(), st.booleans()), max_size=20))
def test_encode_gives_sentencepieces_ids_in_order(
    stub: TokenizerServiceStub,
    reference: SentencePieceProcessor,
    wanted: list[tuple[str, bool, bool]],
) -> None:
    segments = [Segment(text=text, bos=bos, eos=eos) for text, bos, eos in wanted]
    response = stub.Encode(EncodeRequest(segments=segments))
    assert [list(segment.ids) for segment in response.segments] == [
        reference.Encode(text, add_bos=bos, add_eos=eos) for text, bos, eos in wanted
    ]


@given(st.lists(st.lists(st.integers(0, 559)), max_size=20))
def test_decode_gives_sentencepieces_text_in_order(
    stub: TokenizerServiceStub, reference: SentencePieceProcessor, sequences: list[list[int]]
) -> None:
    request = DecodeRequest(sequences=[TokenIds(ids=ids) for ids in sequences])
    assert list(stub.Decode(request).texts) == [reference.Decode(ids) for ids in sequences]


def test_vocabulary_comes_with_all_that_decoding_needs(
    stub: TokenizerServiceStub, tokenizer: Tokenizer
) -> None:
    vocabulary = stub.GetVocabulary(GetVocabularyRequest())
    assert list(vocabulary.pieces) == tokenizer.vocabulary()
    assert (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)
    assert not vocabulary.HasField("pad_id")
    assert vocabulary.dummy_prefix
    assert vocabulary.fingerprint == tokenizer.fingerprint
    assert list(vocabulary.eos_ids) == [2]
    assert {piece.name: i for i, piece in enumerate(vocabulary.pieces) if piece.name} == {
        "<s>": 1,
        "</s>": 2,
    }
    assert (vocabulary.chat_template, vocabulary.byte_level) == ("", False)


def test_segment_begins_with_the_id_of_its_control_token(
    stub: TokenizerServiceStub, tokenizer: Tokenizer
) -> None:
    segments = [
        Segment(text="llama", bos=True, eos=True, control_token="</s>"),
        Segment(control_token="<s>"),
    ]
    response = stub.Encode(EncodeRequest(segments=segments))
    llama = tokenizer.encode("llama", bos=False, eos=False)
    assert [list(each.ids) for each in response.segments] == [[1, 2, *llama, 2], [1]]


def test_every_unknown_control_token_is_named(stub: TokenizerServiceStub) -> None:
    names = ["<s>", "<|im_end|>", "", "<unk>", "<0x0A>"]
    segments = [Segment(text="a", control_token=name) for name in names]
    with pytest.raises(grpc.RpcError) as error:
        stub.Encode(EncodeRequest(segments=segments))
    assert dict(violations(error.value)) == {
        f"segments[{index}].control_token": (
            f"the model's vocabulary has no control token {names[index]!r}"
        )
        for index in (1, 3, 4)
    }


async def test_vocabulary_of_a_chat_model_has_its_template_and_all_ends(tmp_path: Path) -> None:
    golden = SentencePieceProcessor(
        model_file=str(Path(__file__).parents[1] / "golden" / "tokenizer.model")
    )
    template = "{{ messages[0].content }}"
    path = llama_gguf(
        golden, tmp_path / "a.gguf", eot_token_id=1, add_bos_token=False, chat_template=template
    )
    servicer = TokenizerServicer(open_tokenizer(path))
    vocabulary = await servicer.GetVocabulary(GetVocabularyRequest(), None)
    assert list(vocabulary.eos_ids) == [2, 1]
    assert vocabulary.chat_template == template
    assert not vocabulary.HasField("bos_id")


def test_every_sequence_with_an_unknown_id_is_named(stub: TokenizerServiceStub) -> None:
    sequences = [TokenIds(ids=ids) for ids in ([1, 2], [5, 6, 7, 560], [], [2**32 - 1])]
    with pytest.raises(grpc.RpcError) as error:
        stub.Decode(DecodeRequest(sequences=sequences))
    assert dict(violations(error.value)) == {
        "sequences[1].ids[3]": "must be from 0 to 559, got 560",
        "sequences[3].ids[0]": "must be from 0 to 559, got 4294967295",
    }


def test_4096_segments_are_the_most(stub: TokenizerServiceStub) -> None:
    request = EncodeRequest(segments=[Segment(text="a")] * 4096)
    assert len(stub.Encode(request).segments) == 4096
    request.segments.add(text="a")
    with pytest.raises(grpc.RpcError) as error:
        stub.Encode(request)
    assert dict(violations(error.value)) == {"segments": "at most 4096 a call, got 4097"}


def test_4096_sequences_are_the_most(stub: TokenizerServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.Decode(DecodeRequest(sequences=[TokenIds()] * 4097))
    assert dict(violations(error.value)) == {"sequences": "at most 4096 a call, got 4097"}


def test_lone_surrogate_on_the_wire_is_the_callers_fault(channel: grpc.Channel) -> None:
    encode: Any = channel.unary_unary(f"/{SERVICE}/Encode")
    with pytest.raises(grpc.RpcError) as error:
        encode(b"\x0a\x05\x0a\x03\xed\xa0\x80")  # segments { text: U+D800 as UTF-8 forbids it }
    failed: Any = error.value
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "strings must be valid UTF-8" in failed.details()


def health_answers_while_encoding(channel: grpc.Channel, begin: Any, words: int) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    encoding = begin(channel, EncodeRequest(segments=[Segment(text="llama " * words)]))
    answer = health.Check(HealthCheckRequest(service=SERVICE))
    assert not encoding.done()
    assert answer.status == HealthCheckResponse.SERVING
    assert len(next(encoding).segments[0].ids) > words


def test_health_answers_while_a_long_text_is_encoded(channel: grpc.Channel, begin: Any) -> None:
    health_answers_while_encoding(channel, begin, 600_000)


def test_health_answers_while_a_tokenizer_json_encodes(
    launch: Any, begin: Any, reference: SentencePieceProcessor, tmp_path: Path
) -> None:
    path = llama_tokenizer_json(reference, tmp_path / "tokenizer.json")
    process = launch("--tokenizer_path", path, "--port", "0")
    with grpc.insecure_channel(process.wait_for("listening")["address"]) as channel:
        process.ignore_log()
        health_answers_while_encoding(channel, begin, 300_000)


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) >= {SERVICE, "grpc.health.v1.Health"}
    described = database.FindFileContainingSymbol(SERVICE).service[0]
    assert [method.name for method in described.method] == ["Encode", "Decode", "GetVocabulary"]


async def test_small_call_takes_turns_with_a_caller_of_large_ones(tokenizer: Tokenizer) -> None:
    servicer, done = TokenizerServicer(tokenizer), []
    text = "llama " * (MAX_BYTES_AT_ONCE // 6)

    async def encode(caller: str, text: str) -> None:
        request = EncodeRequest(segments=[Segment(text=text)], caller=caller)
        await servicer.Encode(request, None)
        done.append(caller)

    async with asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(encode("large", text))
        group.create_task(encode("small", "llama"))
    assert done.index("small") <= 2
