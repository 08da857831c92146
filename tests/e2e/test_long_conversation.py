"""A conversation that outgrows the context, with the demonstration checkpoint."""

from collections.abc import Callable

from client import Client, FinishReason, Message
from tests.e2e.deployments import Stack

QUESTIONS = ["What do llamas eat?", "Who were the chasquis?", "How fast were they?", "Thank you!"]


def test_answers_of_a_long_conversation_are_not_cut_off(
    demo_services: Callable[..., Stack],
) -> None:
    stack, dropped = demo_services(max_batch_size=1), 0
    dialog: list[Message] = []
    with Client(stack.gateway.address) as client:
        for turn in range(24):
            dialog.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            answer = client.chat(dialog, temperature=0, context_policy="drop_oldest_turns")
            assert answer.finish_reason is FinishReason.STOP
            assert answer.usage.prompt_tokens <= 512 - 128
            dialog.append(answer.message)
            dropped = max(dropped, answer.dropped_turns)
    assert dropped > 5
