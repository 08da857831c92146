"""The shape of a Llama 2 network, as `params.json` states it.

Sizes that Meta's code derives (head and hidden dimension) are derived only here.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from model_service.model.errors import CheckpointError

Quantization = Literal["none", "int8", "int4", "fp8"]

ROPE_THETA = 10000.0
VOCAB_SIZE_FROM_EMBEDDING = -1
# Far above any Llama 2: a larger number is a mistake, and computing with it could overflow.
MAX_SIZE = 2**20
_FRACTION_LIMITS = {"norm_eps": 0.1, "ffn_dim_multiplier": 64.0}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Meta's `ModelArgs` (llama/model.py), without the run-time limits.

    Chasqui adds `quantization`: how the checkpoint stores the weights of its linear layers.
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

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; fewer than `n_heads` in grouped-query attention."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: `FeedForward.__init__` in Meta's llama/model.py."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full (unsharded) shape of every parameter, by Meta's names."""
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


def read_params(path: Path) -> ModelConfig:
    """The configuration in a `params.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, or does not describe a Llama 2 network.
    """
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            path, "not found", "name the folder that holds params.json and consolidated.*.pth"
        ) from None
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror}", "make it readable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}", "copy it again") from error
    if not isinstance(params, dict):
        raise CheckpointError(path, "holds no JSON object", "copy it again")
    return _validated(path, params)


def _validated(path: Path, params: Mapping[str, object]) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(params) - known)
    if unknown:
        raise CheckpointError(
            path,
            f"has settings that Llama 2 does not know: {', '.join(unknown)}",
            "serve a Llama 2 checkpoint in Meta's format",
        )
    for name, value in params.items():
        if rule := _broken_rule(name, value):
            raise CheckpointError(
                path, f"{name} is {reprlib.repr(value)}, not {rule}", "correct it"
            )
    config = ModelConfig(**params)  # type: ignore[arg-type]  # each value was checked above
    if config.dim % config.n_heads or config.head_dim % 2 or config.n_heads % config.kv_heads:
        raise CheckpointError(
            path,
            f"dim {config.dim}, n_heads {config.n_heads} and n_kv_heads {config.kv_heads} do not "
            "divide into heads of even size",
            "copy it again",
        )
    return config


def _broken_rule(name: str, value: object) -> str:
    """The rule that `value` breaks as the setting `name`; empty if it breaks none."""
    if name == "quantization":
        names = get_args(Quantization)
        return "" if value in names else " or ".join(names)
    if value is None and name in {"n_kv_heads", "ffn_dim_multiplier"}:
        return ""
    if name == "vocab_size" and value == VOCAB_SIZE_FROM_EMBEDDING:
        return ""
    if name in _FRACTION_LIMITS:
        limit = _FRACTION_LIMITS[name]
        holds = _is_number(value, (int, float)) and 0 < value <= limit  # type: ignore[operator]
        return "" if holds else f"a number above 0 and at most {limit:g}"
    holds = _is_number(value, (int,)) and 1 <= value <= MAX_SIZE  # type: ignore[operator]
    return "" if holds else f"an integer from 1 to {MAX_SIZE}"


def _is_number(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
