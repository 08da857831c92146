"""The networks that are measured: real shapes, random weights.

A benchmark asks for a shape, not for a model: speed depends on sizes alone, and weights drawn from
a seed need no download and no licence.
"""

import math
import random
from dataclasses import dataclass

from model_service.model.config import ModelConfig

FIRST_ORDINARY_ID = 259  # ids before it are the control and byte pieces of a Llama 2 vocabulary


@dataclass(frozen=True, slots=True)
class Shape:
    """A named network."""

    name: str
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(size) for size in self.config.parameter_shapes().values())

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' matrices; they and the output's multiply, the rest is small."""
        config = self.config
        query, key_value = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        attention = 2 * config.dim * (query + key_value)
        return config.n_layers * (attention + 3 * config.dim * config.hidden_dim)

    @property
    def output_parameters(self) -> int:
        """Weights of the output matrix."""
        return self.config.vocab_size * self.config.dim

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that the cache keeps for one token of one sequence."""
        return 2 * self.config.n_layers * self.config.kv_heads * self.config.head_dim


SHAPES = {
    name: Shape(name, config)
    for name, config in {
        # For the tests.
        "tiny": ModelConfig(
            dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=64
        ),
        # The largest of llama2.c's models.
        "110M": ModelConfig(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
        # TinyLlama's: grouped-query attention, hidden size 5632.
        "1.1B": ModelConfig(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000),
        # Llama 2's own three.
        "7B": ModelConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
        "13B": ModelConfig(dim=5120, n_layers=40, n_heads=40, vocab_size=32000),
        "70B": ModelConfig(
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            vocab_size=32000,
            multiple_of=4096,
            ffn_dim_multiplier=1.3,
        ),
    }.items()
}


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` ordinary ids."""
    source, ordinary = random.Random(seed), range(FIRST_ORDINARY_ID, vocab_size)
    return [source.choices(ordinary, k=length) for _ in range(count)]
