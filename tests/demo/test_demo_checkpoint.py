"""The demonstration checkpoint as it ships: its format, its size, and what it answers.

The answers are those of the engine that serves it. After a change of the text, train again:
python -m demo.train
"""

import json
from random import Random

import pytest
import torch

from demo.checkpoint import (
    CHECKPOINT,
    MANIFEST,
    PARAMS,
    TOKENIZER,
    WEIGHTS,
    file_digest,
    read,
    text_digest,
)
from demo.dialogs import Composer, Shares, plain
from demo.evaluate import Answer, Model, is_sensible, prompt_of, topic_prompts
from demo.text import expand, read_corpus, read_questions
from demo.train import Settings, manifest_settings

GREEDY = (0.0, 0.9)
DEFAULT_SAMPLING = (0.6, 0.9)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load()


@pytest.fixture(scope="module")
def topic_answers(model: Model) -> list[Answer]:
    return model.answer(topic_prompts(model.tokenizer, read_corpus().topics), *GREEDY)


def held_out_score(model: Model, temperature: float, top_p: float) -> float:
    questions = read_questions()
    prompts = [prompt_of(model.tokenizer, question) for question in questions]
    answers = model.answer(prompts, temperature, top_p)
    return sum(map(is_sensible, questions, answers)) / len(questions)


def test_all_files_together_stay_below_eight_million_bytes() -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == {WEIGHTS, PARAMS, TOKENIZER, MANIFEST}
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000


def test_weights_are_a_flat_bfloat16_dict_with_metas_names() -> None:
    state = torch.load(CHECKPOINT / WEIGHTS, weights_only=True)
    layer = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    layer += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
    layer += ["attention_norm", "ffn_norm"]
    names = {f"layers.{i}.{name}.weight" for i in range(Settings().n_layers) for name in layer}
    assert set(state) == names | {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_params_are_metas_and_divide_over_four_shards() -> None:
    params = json.loads((CHECKPOINT / PARAMS).read_text())
    shape = read(CHECKPOINT)[0].shape
    assert params["vocab_size"] == -1
    assert set(params) == {
        "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps", "vocab_size",
    }  # fmt: skip
    for size in (shape.dim, shape.n_heads, shape.n_kv_heads, shape.hidden, shape.vocab_size):
        assert size % 4 == 0


def test_tags_are_plain_text_and_any_text_survives_the_tokenizer(model: Model) -> None:
    tokenizer = model.tokenizer
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("[INST] <<SYS>>\nhi\n<</SYS>>\n\n [/INST]", "  Ayni, ñ, 日本 🦙👩‍🚀 ", "</s><s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids)


def test_the_checkpoint_was_trained_from_the_text_and_settings_in_the_repository() -> None:
    manifest = json.loads((CHECKPOINT / MANIFEST).read_text())
    assert manifest["text"] == text_digest()
    assert {key: manifest[key] for key in ("settings", "shares")} == manifest_settings(Settings())


def test_the_files_are_those_of_the_manifest() -> None:
    for name, digest in json.loads((CHECKPOINT / MANIFEST).read_text())["files"].items():
        assert file_digest(CHECKPOINT / name) == digest


def test_training_dialogs_never_ask_a_held_out_question() -> None:
    questions = read_questions()
    composer = Composer(read_corpus(), questions, Shares(), Random(7))
    held_out = {plain(question.ask) for question in questions if question.system is None}
    for _ in range(10_000):
        assert not {plain(turn.user) for turn in composer.dialog().turns} & held_out


def test_a_held_out_question_with_a_known_system_message_is_in_new_words() -> None:
    corpus = read_corpus()
    patterns = [*corpus.neutral, *(text for style in corpus.styles for text in style.system)]
    known = {plain(text) for pattern in patterns for text in expand(pattern)}
    wordings = {plain(text) for t in corpus.topics for ask in t.ask for text in expand(ask)}
    for question in read_questions():
        assert plain(question.system or "") not in known or plain(question.ask) not in wordings


def test_held_out_questions_are_answered_sensibly(model: Model) -> None:
    assert held_out_score(model, *GREEDY) >= 0.9


@pytest.mark.parametrize("seed", [1, 2])
def test_held_out_questions_are_answered_sensibly_at_the_default_sampling(seed: int) -> None:
    assert held_out_score(Model.load(seed=seed), *DEFAULT_SAMPLING) >= 0.85


def test_every_topic_stops_by_itself(topic_answers: list[Answer]) -> None:
    assert all(answer.stopped for answer in topic_answers)


def test_topics_get_an_answer_of_the_text_word_for_word(topic_answers: list[Answer]) -> None:
    topics = read_corpus().topics
    exact = [a.text in t.answer for t, a in zip(topics, topic_answers, strict=True)]
    assert sum(exact) / len(exact) >= 0.97


def test_a_passage_is_continued_and_ends(model: Model) -> None:
    tokenizer = model.tokenizer
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in ("The llama is", "The Andes")]
    for answer in model.answer(prompts, *GREEDY):
        assert answer.stopped
        assert len(answer.text.split()) > 8


def test_a_dialog_of_six_turns_still_gets_the_right_answer(model: Model) -> None:
    users = [
        "hi",
        "what is a llama?",
        "what is the capital of France?",
        "thank you",
        "tell me a joke",
    ]
    messages: list[str] = []
    for user in [*users, "what is the recipe of mayonnaise?"]:
        prompt = model.tokenizer.prompt([*messages, user])
        answer = model.answer([prompt], *GREEDY)[0]
        messages += [user, answer.text]
    assert "yolk" in messages[-1]
    assert answer.stopped


@torch.inference_mode()
def test_training_and_serving_network_agree(model: Model) -> None:
    prompt = model.tokenizer.prompt(["What do llamas eat?"])
    ids, logprobs = model.llama.generate([prompt], 40, 0.0, logprobs=True)
    assert logprobs is not None
    network, _ = read(CHECKPOINT)
    hidden = network(torch.tensor([prompt + ids[0]]))[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(network.output(hidden), dim=-1)
    assert expected.argmax(-1).tolist() == ids[0]
    chosen = expected.gather(-1, torch.tensor(ids).T)[:, 0]
    assert logprobs[0] == pytest.approx(chosen.tolist(), abs=1e-4)
