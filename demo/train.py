"""Trains the demonstration checkpoint from text/: python -m demo.train

The run depends only on the text and the settings: the same seed, library versions and processor
give the same weights. Other processors give weights with similar answers.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from demo import tokenizer as sentencepiece
from demo.checkpoint import CHECKPOINT, text_digest, write
from demo.dialogs import Composer, Shares
from demo.network import Llama, Shape
from demo.text import read_corpus, read_questions
from demo.tokenizer import Example, Tokenizer
from llama.prompt_format.tags import B_INST, E_INST

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Settings:
    """Every number that training depends on."""

    seed: int = 1
    vocab_size: int = 1920
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    multiple_of: int = 32
    norm_eps: float = 1e-5
    steps: int = 2800
    batch_tokens: int = 4096
    max_seq_len: int = 512
    brief: float = 0.5
    brief_tokens: int = 14
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.02

    @property
    def shape(self) -> Shape:
        names = [field.name for field in fields(Shape)]
        return Shape(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of about the same length, padded: tokens and targets are [rows, len]."""

    tokens: torch.Tensor
    targets: torch.Tensor


def manifest_settings(settings: Settings) -> dict[str, Any]:
    """The settings and shares for the manifest, in the types that JSON returns."""
    recorded: dict[str, Any] = json.loads(
        json.dumps({"settings": asdict(settings), "shares": asdict(Shares())})
    )
    return recorded


def train_tokenizer(composer: Composer, vocab_size: int) -> bytes:
    lines: list[str] = []
    for _ in range(12000):
        dialog = composer.dialog()
        for user, turn in dialog.pairs():
            lines += f"{B_INST} {user} {E_INST} {turn.assistant} ".split("\n")
    for passage in composer.corpus.passages * 10:
        lines += passage.split("\n")
    return sentencepiece.train((line for line in lines if line), vocab_size)


def batches(composer: Composer, tokenizer: Tokenizer, settings: Settings) -> Iterator[Batch]:
    """Endless batches: a pool of examples is sorted by length and cut, so that padding is rare."""
    while True:
        pool: list[Example] = []
        while len(pool) < 1500:
            if composer.random.random() < composer.shares.passage:
                example = tokenizer.passage(composer.passage())
            else:
                example = tokenizer.example(composer.dialog())
                if composer.random.random() < settings.brief:
                    example = shorten(example, settings.brief_tokens)
            if len(example[0]) <= settings.max_seq_len:
                pool.append(example)
        pool.sort(key=lambda example: len(example[0]))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if len(example[0]) * (len(cut[-1]) + 1) > settings.batch_tokens:
                cut.append([])
            cut[-1].append(example)
        composer.random.shuffle(cut)
        yield from map(collate, cut)


def shorten(example: Example, keep: int) -> Example:
    """The dialog up to the first `keep` tokens of its last answer.

    The first tokens choose the answer, which is hard. The rest is easy to recite, and learned from
    fewer examples.
    """
    ids, learn = example
    answer = len(learn) - learn[::-1].index(False)  # no answer is learned in part
    return ids[: answer + keep], learn[: answer + keep]


def collate(examples: list[Example]) -> Batch:
    # With few different shapes, memory is used again.
    longest = -(-max(len(ids) for ids, _ in examples) // 16) * 16
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), IGNORED)
    for row, (ids, learn) in enumerate(examples):
        sequence = torch.tensor(ids)
        tokens[row, : len(ids)] = sequence
        shown = torch.where(torch.tensor(learn), sequence, IGNORED)
        targets[row, : len(ids) - 1] = shown[1:]
    return Batch(tokens, targets)


def loss_of(model: Llama, batch: Batch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch.tokens)
        wanted = batch.targets != IGNORED
        logits = model.output(hidden[wanted])  # [learned tokens, vocab]
    return F.cross_entropy(logits.float(), batch.targets[wanted])


def initialise(model: Llama) -> None:
    """Small normal weights, smaller where a layer writes to the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("wo.weight", "w2.weight"))
            scale = 0.02 / math.sqrt(2 * model.shape.n_layers) if residual else 0.02
            torch.nn.init.normal_(parameter, std=scale)


def make_optimizer(model: Llama, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, with weight decay for the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(settings: Settings, folder: Path) -> None:
    started, busy = time.monotonic(), time.process_time()
    torch.manual_seed(settings.seed)
    # Read before training, so that the digest does not cover later edits.
    manifest = manifest_settings(settings) | {"text": text_digest()}
    composer = Composer(read_corpus(), read_questions(), Shares(), Random(settings.seed))
    pieces = train_tokenizer(composer, settings.vocab_size)
    tokenizer = Tokenizer(pieces)
    model = Llama(settings.shape, settings.dropout)
    initialise(model)
    optimizer = make_optimizer(model, settings)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    mean, seen = 0.0, 0
    for step, batch in zip(
        range(settings.steps), batches(composer, tokenizer, settings), strict=False
    ):
        loss = loss_of(model, batch)
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        seen += batch.tokens.numel()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 49:
            print(
                f"step {step + 1:5}  loss {mean:.4f}  {seen / 1e6:.1f} M tokens  "
                f"{(time.monotonic() - started) / 60:.1f} min "
                f"({(time.process_time() - busy) / 60:.1f} of processor time)",
                flush=True,
            )
    write(folder, model, pieces, manifest)
    print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write to")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    folder, threads = args.pop("out"), args.pop("threads")
    torch.set_num_threads(threads)
    train(replace(Settings(), **args), folder)


if __name__ == "__main__":
    main()
