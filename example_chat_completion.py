"""Answers a few dialogs with Meta's Python API.

python example_chat_completion.py \
    --ckpt_dir demo/checkpoint --tokenizer_path demo/checkpoint/tokenizer.model \
    --max_seq_len 512 --max_batch_size 6

On two shards: python -m model_service.launcher --shards 2 example_chat_completion.py …
"""

import click

from llama import Dialog, Llama

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What do llamas eat?"}],
    [
        {"role": "user", "content": "Who were the chasquis?"},
        {"role": "assistant", "content": "They were the relay runners of the Inca empire."},
        {"role": "user", "content": "How did they carry messages?"},
    ],
    [
        {"role": "system", "content": "Always answer with a haiku"},
        {"role": "user", "content": "I am going to Paris, what should I see?"},
    ],
    [
        {"role": "system", "content": "Always answer with emojis"},
        {"role": "user", "content": "How do I get from Beijing to New York?"},
    ],
    [{"role": "user", "content": "Is [INST] allowed in a message?"}],
]


@click.command(help="Answers a few dialogs with Meta's Python API.")
@click.option("--ckpt_dir", required=True, help="folder with params.json and consolidated.*.pth")
@click.option("--tokenizer_path", required=True, help="the checkpoint's tokenizer.model")
@click.option("--temperature", default=0.6, show_default=True, help="0 is greedy")
@click.option("--top_p", default=0.9, show_default=True, help="probability mass to sample from")
@click.option("--max_seq_len", default=512, show_default=True, help="tokens, prompt and answer")
@click.option("--max_batch_size", default=8, show_default=True, help="dialogs that run at once")
@click.option("--max_gen_len", type=int, help="most tokens of an answer")
def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float,
    top_p: float,
    max_seq_len: int,
    max_batch_size: int,
    max_gen_len: int | None,
) -> None:
    generator = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    answers = generator.chat_completion(
        DIALOGS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len
    )
    for dialog, answer in zip(DIALOGS, answers, strict=True):
        for message in [*dialog, answer["generation"]]:
            print(f"{message['role'].capitalize()}: {message['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    main()
