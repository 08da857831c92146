"""The Llama 2 network on fairscale's tensor-parallel layers, with the arithmetic of Meta's code.

A step is one flat batch of tokens from many sequences, without padding. Only the attention backend
knows which token belongs to which sequence. Every rank runs the same forward pass on its shard, and
sums over the shards put the parts together.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_world_size,
)
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
)
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn
from torch.nn import functional as F

from model_service.model.attention.backend import AttentionBackend, RunsLayers
from model_service.model.attention.rotation import Rotary, attend_rotated
from model_service.model.config import ModelConfig
from model_service.model.cpu import shard_sum
from model_service.model.operations import Operations

# A layer's output, and the residual stream to which it is still to be added, both [tokens, dim].
Hidden = tuple[torch.Tensor, torch.Tensor | None]


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


_column = partial(ColumnParallelLinear, bias=False, gather_output=False, init_method=_unchanged)
_row = partial(RowParallelLinear, bias=False, input_is_parallel=True, init_method=_unchanged)


def _multiply(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The product of a fairscale layer, without the parts that only training needs."""
    return F.linear(x, layer.weight)  # type: ignore[arg-type]  # nn.Module knows no attributes


def sum_over_shards(x: torch.Tensor) -> torch.Tensor:
    """Adds up, in place, the parts of a row-parallel layer's product on all ranks."""
    group = get_model_parallel_group()
    if group.size() > 1:
        if x.is_cuda:
            dist.all_reduce(x, group=group)
        else:
            shard_sum.sum_over_shards(x, group)
    return x


class RMSNorm(nn.Module):
    """The weight of a norm, which the operations compute."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))


@dataclass(frozen=True, slots=True)
class Step:
    """The arguments of every layer in a step beside its input."""

    rotary: Rotary
    operations: Operations
    backend: AttentionBackend


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, for this rank's heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        shards = int(get_model_parallel_world_size())
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = config.n_heads // shards
        projections = (config.n_heads + 2 * config.kv_heads) * config.head_dim
        self.wqkv = _column(config.dim, projections)
        self.wo = _row(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        heads = _multiply(x, self.wqkv).view(len(x), -1, self.head_dim)
        attended = attend_rotated(step.backend, self.layer, heads, self.heads, step.rotary)
        return sum_over_shards(_multiply(attended.flatten(1), self.wo))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w13 = _column(config.dim, 2 * config.hidden_dim)
        self.w2 = _row(config.hidden_dim, config.dim)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        gated = step.operations.gate(_multiply(x, self.w13))
        return sum_over_shards(_multiply(gated, self.w2))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step) -> Hidden:
        """Leaves the addition of both results to the next norm, which reads both anyway."""
        x, residual = _normed(self.attention_norm, x, residual, step.operations)
        attended = self.attention(x, step)
        x, residual = _normed(self.ffn_norm, attended, residual, step.operations)
        return self.feed_forward(x, step), residual


def _normed(
    norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None, operations: Operations
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of residual + x, and that sum; without a residual, x begins the stream."""
    if residual is None:
        return operations.norm(x, norm.weight, norm.eps), x
    return operations.add_norm(x, residual, norm.weight, norm.eps)


class Transformer(nn.Module):
    """One rank's shard of the network. `load_network` fills in the weights."""

    def __init__(self, config: ModelConfig, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        # Which the backend runs, if there are any: all layers, and in place of `forward` a step.
        self.compiled_layers: object | None = None
        self.compiled_step: object | None = None
        self.vocab_size = config.vocab_size
        one_shard = get_model_parallel_world_size() == 1
        self._gather = _unchanged if one_shard else gather_from_model_parallel_region
        self.tok_embeddings = _on_meta(
            ParallelEmbedding(config.vocab_size, config.dim, init_method=_unchanged)
        )
        self.layers = nn.ModuleList(
            _on_meta(TransformerBlock(config, layer)) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = _on_meta(_column(config.dim, config.vocab_size))

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor | None,
        backend: AttentionBackend,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step over a flat batch.

        Args:
            tokens: token ids [num_tokens], sequence after sequence.
            positions: position of each token in its own sequence [num_tokens].
            logit_rows: ascending indices into the batch of the tokens whose logits are wanted
                [num_logits], or None for all.
            backend: holds the cache and the plan of this step.
            out: receives the logits, instead of new memory.

        Returns:
            Logits [num_logits, vocab] in float32, equal on all ranks.
        """
        return self.logits(self.hidden(tokens, positions, backend), logit_rows, out)

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, backend: AttentionBackend
    ) -> Hidden:
        """`forward` up to the last layer's output."""
        rotation = self._operations.rotation(positions)
        step = Step(Rotary(self._operations.rotate, rotation), self._operations, backend)
        x = self._gather(F.embedding(tokens, self.tok_embeddings.weight))  # type: ignore[arg-type]
        residual: torch.Tensor | None = None
        if self.compiled_layers is not None and isinstance(backend, RunsLayers):
            return backend.run_layers(self.compiled_layers, x, rotation)
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return x, residual

    def logits(
        self, hidden: Hidden, logit_rows: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward` from there on; may overwrite `hidden`."""
        x, residual = hidden
        if logit_rows is not None and len(logit_rows) < len(x):
            if not len(logit_rows):  # shards have nothing to gather
                return torch.empty(0, self.vocab_size, device=x.device)
            x, residual = x[logit_rows], None if residual is None else residual[logit_rows]
        x, _ = _normed(self.norm, x, residual, self._operations)
        logits = self._gather(_multiply(x, self.output))
        return logits.float() if out is None else out.copy_(logits)


def _on_meta(module: nn.Module) -> nn.Module:
    """Frees the memory of a new layer, which fairscale allocates on the default device."""
    return module.to("meta")
