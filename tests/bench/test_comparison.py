import dataclasses

import pytest

from bench.baselines.__main__ import baselines_report
from bench.baselines.comparison import Comparison, Plan
from bench.baselines.contenders import CONTENDERS, REFERENCE, default_names
from bench.baselines.environments import UnavailableError
from bench.baselines.same_function import ANSWER_TOKENS, judge


def test_comparison_measures_who_can_run_and_names_who_cannot(plan: Plan) -> None:
    comparison = Comparison(plan)
    comparison.run([REFERENCE, "llama.cpp-bfloat16"])
    assert comparison.absent == {
        "llama.cpp-bfloat16": "the processor does not multiply bfloat16 in hardware"
    }
    assert {key: len(rates) for key, rates in comparison.rates.items()} == {
        ("prefill-32", REFERENCE): 2,
        ("decode-2", REFERENCE): 2,
    }
    assert [verdict.same for verdict in comparison.verdicts] == [True]
    cases = [row.case for row in baselines_report(comparison).rows]
    assert cases[:4] == ["prefill-32", "decode-2", "same function", "not measured"]


def test_default_contenders_suit_the_processor(plan: Plan) -> None:
    narrow = default_names(plan.host)
    assert "transformers-float32" in narrow
    assert "transformers-bfloat16" not in narrow
    wide = default_names(dataclasses.replace(plan.host, features=("avx512", "bf16")))
    assert {"chasqui-bfloat16", "vllm-eager-bfloat16", "llama.cpp-q8_0"} <= set(wide)


def test_bfloat16_needs_the_hardware(plan: Plan) -> None:
    with pytest.raises(UnavailableError, match="bfloat16"):
        CONTENDERS["chasqui-bfloat16"].check(plan.host)


def test_improbable_token_shows_another_function() -> None:
    answer, good = [5] * ANSWER_TOKENS, [0.0] * ANSWER_TOKENS
    assert judge("peer", "float32", answer, good).same
    assert not judge("peer", "float32", answer, [*good[1:], 0.5]).same
    assert judge("peer", "Q4_0", answer, [*good[1:], 0.5]).same


def test_answer_of_wrong_length_is_not_judged() -> None:
    with pytest.raises(ValueError, match="answered 1 tokens"):
        judge("peer", "float32", [5], [0.0])
