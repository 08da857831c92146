"""Hand-computed for Llama 2 7B: 32 layers of four 4096² and three 4096 × 11008, 32,000 outputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.roofline import Card, Network, Work
from bench.shapes import SHAPES

LAYERS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
OUTPUT = 32000 * 4096
CARD = Card(copy=4e12, read=4e12, matrix={"bfloat16": 8e14, "float8": 16e14})
WIDE = Network(SHAPES["7B"], "bfloat16")


def test_a_step_of_one_stream_reads_13_gigabytes_and_half_a_megabyte_per_token_of_context() -> None:
    assert WIDE.weight_bytes() == 2 * (LAYERS + OUTPUT) == 13_214_154_752
    assert WIDE.bytes(Work.decode([1])) - WIDE.weight_bytes() == 2 * 2 * 32 * 4096 == 524_288
    assert WIDE.least_seconds(Work.decode([1000]), CARD) == pytest.approx(3.4346e-3, rel=1e-4)


def test_grouped_queries_share_keys_and_values() -> None:
    large = Network(SHAPES["70B"], "int8")
    assert large.weight_bytes() == 80 * 8192 * (2 * 9216 + 3 * 28672) + 32000 * 8192
    assert large.bytes(Work.decode([1])) - large.weight_bytes() == 2 * 2 * 80 * 8 * 128


def test_a_prompt_is_bound_by_arithmetic() -> None:
    pairs = 2048 * 2049 // 2
    operations = 2 * LAYERS * 2048 + 2 * OUTPUT + 4 * 32 * 4096 * pairs
    assert WIDE.operations(Work.prompt(2048)) == operations == 27_626_028_662_784
    assert WIDE.least_seconds(Work.prompt(2048), CARD) == operations / 8e14


def test_formats_read_fewer_bytes_and_only_fp8_multiplies_faster() -> None:
    weights = LAYERS + OUTPUT
    networks = {name: Network(SHAPES["7B"], name) for name in ("int8", "int4", "fp8")}
    read = {name: network.weight_bytes() for name, network in networks.items()}
    assert read == {"int8": weights, "int4": weights * 0.625, "fp8": weights}
    assert [networks[name].rate(CARD) for name in read] == [8e14, 8e14, 16e14]


def test_a_cache_of_bytes_is_read_in_half_the_time() -> None:
    half = Network(SHAPES["7B"], "bfloat16", kv_bytes=1)
    context = Work(context=1000)
    assert WIDE.bytes(context) - half.bytes(context) == 1000 * 262_144


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=64))
def test_work_of_two_steps_adds_up(contexts: list[int]) -> None:
    together = Work.decode(contexts)
    apart = sum((Work.decode([context]) for context in contexts), Work())
    assert together == apart
    assert WIDE.operations(together) == pytest.approx(
        sum(WIDE.operations(Work.decode([context])) for context in contexts)
    )


@given(st.integers(1, 4096))
def test_all_parts_of_a_prompt_are_the_prompt(length: int) -> None:
    whole, parts = Work.prompt(length), Work.part_of_prompts(length, length)
    assert parts.tokens == whole.tokens
    assert parts.logits == pytest.approx(whole.logits)
    assert parts.pairs == pytest.approx(whole.pairs)
