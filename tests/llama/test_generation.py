"""Meta's API in process: the golden answers, and what it promises around them."""

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from llama import Llama
from serving.errors import StartError
from tests.llama.conftest import (
    DIALOG,
    GOLDEN,
    REFUSAL,
    ROOT,
    TOKENIZER,
    build,
    launch,
    python,
)
from tests.tokenizer_service.forms import llama_gguf, llama_tokenizer_json


def read_cases(name: str, kind: str) -> list[dict[str, Any]]:
    cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return [case for case in cases if case["kind"] == kind]


def test_answers_are_the_same_with_a_tokenizer_json(tmp_path: Path) -> None:
    model = SentencePieceProcessor(model_file=TOKENIZER)
    path = llama_tokenizer_json(model, tmp_path / "tokenizer.json")
    checkpoint = str(GOLDEN / "checkpoints" / "gqa-mp1")
    llama = Llama.build(checkpoint, str(path), max_seq_len=256, max_batch_size=4)
    case = next(each for each in read_cases("gqa", "chat") if each["content"] != REFUSAL)
    [answer] = llama.chat_completion([case["dialog"]], **case["args"])
    assert answer["generation"]["content"] == case["content"]


def test_rows_that_pad_the_embedding_add_no_text(tmp_path: Path) -> None:
    model = SentencePieceProcessor(model_file=TOKENIZER)
    path = llama_gguf(model, tmp_path / "model.gguf", count=540)
    checkpoint = str(GOLDEN / "checkpoints" / "gqa-mp1")
    llama = Llama.build(checkpoint, str(path), max_seq_len=256, max_batch_size=4)
    assert llama.tokenizer.n_words == 540
    [token] = llama.tokenizer.encode("a", bos=False, eos=False)
    assert llama._decoded(([[token, 559]], [[0.0, 0.0]])) == [("a", ["a", ""], [0.0, 0.0])]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("mha-mp2", "mha"), ("mha-mp1-bf16", "mha-bf16"), ("gqa-mp4", "gqa")],
)
def test_chat_completion_answers_what_metas_code_answers(checkpoint: str, name: str) -> None:
    llama = build(checkpoint)
    for case in read_cases(name, "chat"):
        (answer,) = llama.chat_completion([case["dialog"]], **case["args"])
        refused = case["content"] == REFUSAL
        assert answer["generation"] == {"role": "assistant", "content": case["content"]}
        assert answer["tokens"] == ([] if refused else case["tokens"])
        logprobs = [] if refused else case["logprobs"]
        assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4), case["id"]


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_text_completion_answers_what_metas_code_answers(name: str) -> None:
    llama = build(f"{name}-mp1")
    for case in read_cases(name, "text"):
        (answer,) = llama.text_completion([case["prompt"]], **case["args"])
        assert answer["generation"] == case["content"], case["id"]
        assert answer["tokens"] == case["tokens"]
        assert answer["logprobs"] == pytest.approx(case["logprobs"], abs=1e-4), case["id"]


def test_generate_returns_ids_and_logprobs(llama: Llama) -> None:
    cases = read_cases("gqa", "text")[:6]
    for echo in (False, True):
        chosen = [case for case in cases if bool(case["args"].get("echo")) == echo]
        prompts = [case["prompt_ids"] for case in chosen]
        ids, logprobs = llama.generate(prompts, 24, 0.0, logprobs=True, echo=echo)
        assert logprobs is not None
        for case, own_ids, own_logprobs in zip(chosen, ids, logprobs, strict=True):
            assert own_ids[: len(case["ids"])] == case["ids"]
            assert len(own_ids) == len(own_logprobs)


def test_echo_without_logprobs_returns_the_prompt_too(llama: Llama) -> None:
    (scored,), _ = llama.generate([[1, 100, 101]], 5, 0.0, logprobs=True, echo=True)
    (plain,), nothing = llama.generate([[1, 100, 101]], 5, 0.0, echo=True)
    assert plain == scored
    assert nothing is None


def test_logprobs_are_absent_unless_asked_for(llama: Llama) -> None:
    assert llama.chat_completion([DIALOG], max_gen_len=3)[0].keys() == {"generation"}
    assert llama.text_completion(["A"], max_gen_len=3)[0].keys() == {"generation"}


def test_more_prompts_than_the_batch_size_wait_their_turn(llama: Llama) -> None:
    cases = read_cases("gqa", "chat")[:10]
    answers = llama.chat_completion([case["dialog"] for case in cases], 0.0, max_gen_len=8)
    alone = [llama.chat_completion([case["dialog"]], 0.0, max_gen_len=8)[0] for case in cases]
    assert answers == alone


def test_a_prompts_budget_does_not_depend_on_its_neighbours(llama: Llama) -> None:
    short, long = [1, 100], [1] * 200
    ids, _ = llama.generate([short, long], max_gen_len=100, temperature=0.0)
    assert ids[0] == llama.generate([short], max_gen_len=100, temperature=0.0)[0][0]


def test_the_seed_of_build_makes_samplings_repeatable() -> None:
    first, second, other = (
        [build("gqa-mp1", seed=seed).text_completion(["The"], 1.0, 1.0) for _ in range(1)]
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_a_second_sampling_differs_from_the_first(llama: Llama) -> None:
    first, second = (llama.text_completion(["The"], 1.0, 1.0) for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("dialog", "rule"),
    [
        ([], r"dialogs\[0\].messages: must not be empty"),
        ([{"role": "assistant", "content": "x"}], r"dialogs\[0\].messages\[0\].role"),
        ([{"role": "system", "content": "x"}], r"dialogs\[0\].messages\[0\].role"),
        ([*DIALOG, {"role": "assistant", "content": "x"}], r"dialogs\[0\].messages\[1\].role"),
    ],
)
def test_a_dialog_out_of_order_is_refused(llama: Llama, dialog: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        llama.chat_completion([dialog])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(llama: Llama) -> None:
    with pytest.raises(ValueError, match="300 tokens, the context length is 256"):
        llama.generate([[1] * 300], max_gen_len=5)


def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="model_parallel_size is 2, but 1 processes run"):
        build("gqa-mp1", model_parallel_size=2)
    with pytest.raises(ValueError, match="tokenizer"):
        Llama.build(str(GOLDEN / "checkpoints" / "gqa-mp1"), str(tmp_path / "no.model"), 256, 4)


SCRIPT = """
import json, sys
from llama import Llama
name, checkpoint, tokenizer, cases, every = sys.argv[1:]
llama = Llama.build(checkpoint, tokenizer, max_seq_len=256, max_batch_size=4)
answers = []
for case in json.load(open(cases))["cases"][::int(every)]:
    if case["kind"] == "chat":
        answers += llama.chat_completion([case["dialog"]], **case["args"])
    else:
        answers += llama.text_completion([case["prompt"]], **case["args"])
rank = int(__import__("os").environ["RANK"])
json.dump(answers, open(f"{name}-{rank}.json", "w"))
print("answered")
"""


def test_every_rank_of_two_returns_what_metas_code_answers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder, cases, every = GOLDEN / "checkpoints" / "gqa-mp2", GOLDEN / "gqa.json", 3
    expected = json.loads(cases.read_text())["cases"][::every]
    assert {case["kind"] for case in expected} == {"chat", "text"}
    output = launch(2, script, tmp_path / "answers", folder, TOKENIZER, cases, every)
    assert output.count("answered") == 1  # rank 0 alone prints
    for rank in range(2):
        answers = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        for case, answer in zip(expected, answers, strict=True):
            if case["content"] != REFUSAL:
                assert answer["tokens"] == case["tokens"], case["id"]
                assert answer["logprobs"] == pytest.approx(case["logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("example", "launcher"),
    [
        ("text", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")),
        ("chat", ("-m", "model_service.launcher", "--shards=2")),
    ],
)
def test_metas_example_commands_run(example: str, launcher: tuple[str, ...]) -> None:
    script = ROOT / f"example_{example}_completion.py"
    options = ["--ckpt_dir", GOLDEN / "checkpoints" / "gqa-mp2", "--tokenizer_path", TOKENIZER]
    output = python(*launcher, script, *options, "--max_seq_len", "256", "--max_gen_len", "8")
    assert output.count("==================================") == (5 if example == "chat" else 4)
    assert output.startswith("Loaded in ")
