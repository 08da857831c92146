"""The shape of a Llama network, and the rules that its sizes keep.

Sizes that Meta's code derives (head and hidden dimension) are derived only here. Other formats of
checkpoints state them.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Quantization = Literal["none", "int8", "int4", "fp8"]
RopeScalingKind = Literal["linear", "llama3"]

ROPE_THETA = 10000.0
VOCAB_SIZE_FROM_EMBEDDING = -1
# Far above any Llama: a larger number is a mistake, and computing with it could overflow.
MAX_SIZE = 2**20
# The smallest and the largest value of a setting; 0 itself is excluded.
_NUMBER_LIMITS = {
    "norm_eps": (0.0, 0.1),
    "ffn_dim_multiplier": (0.0, 64.0),
    "rope_theta": (1.0, 1e12),
    "factor": (1.0, 1024.0),
    "low_freq_factor": (0.0, 1024.0),
    "high_freq_factor": (0.0, 1024.0),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A change of the rotary frequencies, by which a model reads longer contexts.

    Attributes:
        kind: linear divides all frequencies by `factor` (Chen et al., 2023); llama3 divides the
            low ones, keeps the high ones and interpolates between them.
        factor: at least 1.
        low_freq_factor: frequencies that turn fewer times than this within
            `original_context_length` tokens are divided; llama3 only, like the rest.
        high_freq_factor: frequencies that turn more often than this stay; above the former.
        original_context_length: tokens for which the model was trained before it was extended.
    """

    kind: RopeScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    @classmethod
    def checked(cls, settings: Mapping[str, object]) -> "RopeScaling":
        """The scaling with these fields.

        Raises:
            ValueError: a field is unknown, missing or out of range; the text says which.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(names)):
            raise ValueError(f"has the unknown field {unknown[0]!r}, not only {', '.join(names)}")
        for name in ("kind", "factor"):
            if name not in settings:
                raise ValueError(f"lacks {name}")
        for name, value in settings.items():
            if rule := broken_rule(name, value):
                raise ValueError(f"has {name} {reprlib.repr(value)}, not {rule}")
        scaling = cls(**settings)  # type: ignore[arg-type]  # each value was checked above
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise ValueError(
                f"has low_freq_factor {scaling.low_freq_factor:g}, not a number below its "
                f"high_freq_factor {scaling.high_freq_factor:g}"
            )
        return scaling


# `apply_scaling` in the llama/model.py of Meta's Llama 3.
LLAMA_3_SCALING = RopeScaling("llama3", factor=8.0)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Meta's `ModelArgs` (llama/model.py), without the run-time limits, and what others add to it.

    Attributes:
        head_dim: features of one head; 0 stands for dim / n_heads.
        hidden_dim: width of the feed-forward layer; 0 stands for Meta's formula. Neither is 0 in
            a made configuration.
        multiple_of: only for that formula, like `ffn_dim_multiplier`.
        quantization: how the checkpoint stores the weights of its linear layers.
        rope_theta: base of the rotary frequencies.
        tied_embeddings: whether the output matrix is the embedding, stored once.
        trained_context_length: most tokens of a sequence; None if nothing is known about it.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = VOCAB_SIZE_FROM_EMBEDDING
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    quantization: Quantization = "none"
    rope_theta: float = ROPE_THETA
    rope_scaling: RopeScaling | None = None
    head_dim: int = 0
    hidden_dim: int = 0
    tied_embeddings: bool = False
    trained_context_length: int | None = None

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if not self.hidden_dim:
            object.__setattr__(self, "hidden_dim", self._derived_hidden_dim())

    def _derived_hidden_dim(self) -> int:
        """Width of the feed-forward layer: `FeedForward.__init__` in Meta's llama/model.py."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; fewer than `n_heads` in grouped-query attention."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def parameters(self) -> int:
        """Number of different weights: a tied output matrix is the embedding's."""
        counted = sum(math.prod(shape) for shape in self.parameter_shapes().values())
        return counted - (self.vocab_size * self.dim if self.tied_embeddings else 0)

    def uneven_heads(self) -> str:
        """The rule that the sizes of heads break; empty if they break none."""
        if self.head_dim % 2:
            return f"head_dim {self.head_dim} is odd, but its features rotate in pairs"
        if self.n_heads % self.kv_heads:
            return f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.kv_heads}"
        return ""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full (unsharded) shape of every parameter, by Meta's names; a tied output is one, too."""
        query, key_value = self.n_heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            prefix = f"layers.{layer}."
            shapes |= {
                f"{prefix}attention.wq.weight": (query, self.dim),
                f"{prefix}attention.wk.weight": (key_value, self.dim),
                f"{prefix}attention.wv.weight": (key_value, self.dim),
                f"{prefix}attention.wo.weight": (self.dim, query),
                f"{prefix}feed_forward.w1.weight": (self.hidden_dim, self.dim),
                f"{prefix}feed_forward.w3.weight": (self.hidden_dim, self.dim),
                f"{prefix}feed_forward.w2.weight": (self.dim, self.hidden_dim),
                f"{prefix}attention_norm.weight": (self.dim,),
                f"{prefix}ffn_norm.weight": (self.dim,),
            }
        return shapes | {
            "norm.weight": (self.dim,),
            "output.weight": (self.vocab_size, self.dim),
        }

    @property
    def divided_sizes(self) -> dict[str, int]:
        """The sizes that are cut into equal parts, one for each shard."""
        return {
            "n_heads": self.n_heads,
            "n_kv_heads": self.kv_heads,
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "vocab_size": self.vocab_size,
        }

    def indivisible_by(self, shards: int) -> list[str]:
        """The sizes that cannot be cut into `shards` equal parts, each as `name value`."""
        return [f"{name} {size}" for name, size in self.divided_sizes.items() if size % shards]

    def shard_counts(self) -> list[int]:
        """All numbers of shards that the network can be cut into."""
        most = math.gcd(*self.divided_sizes.values())
        return [count for count in range(1, most + 1) if most % count == 0]


def broken_rule(name: str, value: object) -> str:
    """The rule that `value` breaks as the setting `name`; empty if it breaks none."""
    if name in _CHOICES:
        return "" if value in _CHOICES[name] else " or ".join(_CHOICES[name])
    if value is None and name in {"n_kv_heads", "ffn_dim_multiplier", "trained_context_length"}:
        return ""
    if name == "vocab_size" and value == VOCAB_SIZE_FROM_EMBEDDING:
        return ""
    if name in _NUMBER_LIMITS:
        low, high = _NUMBER_LIMITS[name]
        holds = _is_number(value, (int, float)) and value > 0 and low <= value <= high  # type: ignore[operator]
        rule = f"from {low:g} to {high:g}" if low else f"above 0 and at most {high:g}"
        return "" if holds else f"a number {rule}"
    holds = _is_number(value, (int,)) and 1 <= value <= _MAX_LENGTHS.get(name, MAX_SIZE)  # type: ignore[operator]
    return "" if holds else f"an integer from 1 to {_MAX_LENGTHS.get(name, MAX_SIZE)}"


_CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": get_args(Quantization),
    "kind": get_args(RopeScalingKind),
}
# Some models state 10 million tokens and more.
_MAX_LENGTHS = {"trained_context_length": 2**30, "original_context_length": 2**30}


def _is_number(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
