"""The least time that a step can take: bytes over bandwidth, or operations over the matrix rate.

Pure arithmetic on sizes. A step has to read all weights once and every cached key and value that
its tokens attend to; it has to multiply each token with every weight of the layers, and each row
whose logits are wanted with the output matrix. Left out, as they are small: norms, scales of one
per output, activations, the embedding's rows, and what is written to the cache. So the bounds are a
little lower than any engine can reach, and shares a little lower than they would else be.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from bench.shapes import Shape

# Bytes of one weight of a linear layer. 4-bit codes come in groups of 32 with a scale and a zero in
# bfloat16 each; the scales of 8-bit ones, one per output, are left out.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "fp8": 1.0,
    "int4": 0.5 + 2 * 2 / 32,
}
# In which numbers a matrix product of each format is computed: weights of 8 and 4 bits alone are
# widened on their way, with fp8 the activations are narrowed.
MULTIPLIED_AS = {"int8": "bfloat16", "int4": "bfloat16", "fp8": "float8"}


@dataclass(frozen=True, slots=True)
class Card:
    """What one device does at best, measured."""

    copy: float  # bytes per second of a copy on the device, those read and those written
    read: float  # bytes per second, read alone
    matrix: Mapping[str, float]  # operations per second of a matrix product, by type


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to compute."""

    tokens: float = 0  # that go through the layers
    logits: float = 0  # rows that go through the output matrix
    context: float = 0  # cached tokens whose keys and values are read
    pairs: float = 0  # a query with a key that it sees

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.tokens + other.tokens,
            self.logits + other.logits,
            self.context + other.context,
            self.pairs + other.pairs,
        )

    @classmethod
    def decode(cls, contexts: Iterable[int]) -> Self:
        """One token of each sequence; `contexts` are their lengths, that token included."""
        lengths = tuple(contexts)
        seen = sum(lengths)
        return cls(tokens=len(lengths), logits=len(lengths), context=seen, pairs=seen)

    @classmethod
    def prompt(cls, length: int) -> Self:
        """A whole prompt in one step, up to the logits behind its last token."""
        return cls(tokens=length, logits=1, context=length, pairs=length * (length + 1) / 2)

    @classmethod
    def part_of_prompts(cls, tokens: int, length: float) -> Self:
        """So many tokens out of prompts of `length`, each as far in as the average."""
        return cls(tokens=tokens, logits=tokens / length, pairs=tokens * (length + 1) / 2)


@dataclass(frozen=True, slots=True)
class Network:
    """A shape whose linear layers hold their weights in one format."""

    shape: Shape
    precision: str  # a key of WEIGHT_BYTES
    kv_bytes: int = 2  # of one number in the cache

    def weight_bytes(self) -> float:
        """Of all matrices that a step with logits reads."""
        weights = self.shape.layer_parameters + self.shape.output_parameters
        return weights * WEIGHT_BYTES[self.precision]

    def bytes(self, work: Work) -> float:
        """That a step has to read."""
        per_token = self.shape.kv_elements_per_token * self.kv_bytes
        return self.weight_bytes() + work.context * per_token

    def operations(self, work: Work) -> float:
        """Additions and multiplications of a step's matrix products and attention."""
        config = self.shape.config
        layers = 2 * self.shape.layer_parameters * work.tokens
        output = 2 * self.shape.output_parameters * work.logits
        # A query's product with a key, and its share of a value, in each head.
        attention = 4 * config.n_layers * config.n_heads * config.head_dim * work.pairs
        return layers + output + attention

    def rate(self, card: Card) -> float:
        """The card's operations per second in the numbers that this network multiplies in."""
        return card.matrix[MULTIPLIED_AS.get(self.precision, self.precision)]

    def reading_seconds(self, work: Work, card: Card) -> float:
        """At the bandwidth of a copy."""
        return self.bytes(work) / card.copy

    def computing_seconds(self, work: Work, card: Card) -> float:
        """At the rate of a matrix product."""
        return self.operations(work) / self.rate(card)

    def least_seconds(self, work: Work, card: Card) -> float:
        """Of one step: reading and computing can at best go on at the same time."""
        return max(self.reading_seconds(work, card), self.computing_seconds(work, card))
