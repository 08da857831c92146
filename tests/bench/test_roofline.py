"""Hand-computed for Llama 2 7B: 32 layers of four 4096² and three 4096 × 11008, 32,000 outputs."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.driver import Job
from bench.engine.roofline import Network, Rates, Work, measure_rates
from bench.shapes import SHAPES

LAYERS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
OUTPUT = 32000 * 4096
RATES = Rates(copy=4e12, read=4e12, matrix={"bfloat16": 8e14, "float8": 16e14})


def network(shape: str, **changes: Any) -> Network:
    """On a GPU, activations in bfloat16."""
    return Job(SHAPES[shape], "bfloat16", torch.device("cuda"), **changes).network


WIDE = network("7B")


def test_a_step_of_one_stream_reads_13_gigabytes_and_half_a_megabyte_per_token_of_context() -> None:
    assert WIDE.weight_bytes() == 2 * (LAYERS + OUTPUT) == 13_214_154_752
    assert WIDE.bytes(Work.decode([1])) - WIDE.weight_bytes() == 2 * 2 * 32 * 4096 == 524_288
    assert WIDE.least_seconds(Work.decode([1000]), RATES) == pytest.approx(3.4346e-3, rel=1e-4)


def test_grouped_queries_share_keys_and_values() -> None:
    large = network("70B", precision="int8")
    assert large.weight_bytes() == 80 * 8192 * (2 * 9216 + 3 * 28672) + 32000 * 8192
    assert large.bytes(Work.decode([1])) - large.weight_bytes() == 2 * 2 * 80 * 8 * 128


def test_a_prompt_is_bound_by_arithmetic() -> None:
    pairs = 2048 * 2049 // 2
    operations = 2 * LAYERS * 2048 + 2 * OUTPUT + 4 * 32 * 4096 * pairs
    assert WIDE.operations(Work.prompt(2048)) == operations == 27_626_028_662_784
    assert WIDE.least_seconds(Work.prompt(2048), RATES) == operations / 8e14


def test_formats_read_fewer_bytes_and_only_fp8_multiplies_faster() -> None:
    weights = LAYERS + OUTPUT
    networks = {name: network("7B", precision=name) for name in ("int8", "int4", "fp8")}
    read = {name: each.weight_bytes() for name, each in networks.items()}
    assert read == {"int8": weights, "int4": weights * 0.5625, "fp8": weights}
    work = Work.prompt(100)
    rates = [
        round(n.operations(work) / n.computing_seconds(work, RATES)) for n in networks.values()
    ]
    assert rates == [8e14, 8e14, 16e14]


def test_a_cache_of_bytes_is_read_in_half_the_time() -> None:
    half = network("7B", settings={"kv_cache_dtype": "fp8"})
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


def test_nothing_to_compute_needs_no_time() -> None:
    assert WIDE.least_seconds(Work(), RATES) == 0


def test_rates_are_measured_in_the_type_of_the_activations_and_in_8_bits() -> None:
    rates = measure_rates(torch.device("cpu"), "float32")
    assert rates.matrix.keys() == {"float32", "int8"}
    assert 0 < min(rates.copy, rates.read) <= rates.bandwidth
    quantized = Job(SHAPES["tiny"], "float32", torch.device("cpu"), precision="int4").network
    seconds = quantized.computing_seconds(Work.prompt(8), rates)
    assert seconds == quantized.operations(Work.prompt(8)) / rates.matrix["int8"]
