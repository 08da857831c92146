"""Continues a few texts with Meta's Python API.

python example_text_completion.py \
    --ckpt_dir demo/checkpoint --tokenizer_path demo/checkpoint/tokenizer.model \
    --max_seq_len 128 --max_batch_size 4

On two shards: python -m model_service.launcher --shards 2 example_text_completion.py …
"""

import click

from llama import Llama

PROMPTS = [
    "The llama is",
    "The Andes are",
    "To make a good soup you need",
    "The chasquis were",
]


@click.command(help="Continues a few texts with Meta's Python API.")
@click.option("--ckpt_dir", required=True, help="folder with params.json and consolidated.*.pth")
@click.option("--tokenizer_path", required=True, help="the checkpoint's tokenizer.model")
@click.option("--temperature", default=0.6, show_default=True, help="0 is greedy")
@click.option("--top_p", default=0.9, show_default=True, help="probability mass to sample from")
@click.option("--max_seq_len", default=128, show_default=True, help="tokens, prompt and answer")
@click.option("--max_batch_size", default=4, show_default=True, help="texts that run at once")
@click.option("--max_gen_len", default=64, show_default=True, help="most tokens to add to a text")
def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float,
    top_p: float,
    max_seq_len: int,
    max_batch_size: int,
    max_gen_len: int,
) -> None:
    generator = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    results = generator.text_completion(
        PROMPTS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    main()
