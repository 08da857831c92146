"""The Llama 2 network on fairscale's tensor-parallel layers, with the arithmetic of Meta's.

It sees one flat batch of tokens from many sequences, without padding and without knowing which
token belongs to whom: only attention does, and that is the backend's part. Every rank runs the same
forward on its shard; fairscale's layers do the all-reduces.
"""

from collections.abc import Iterable

import torch
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
)
from torch import nn
from torch.nn import functional as F

from model_service.model.attention import AttentionBackend
from model_service.model.config import ROPE_THETA, ModelConfig


def _uninitialized(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _column_parallel(inputs: int, outputs: int) -> nn.Module:
    layer: nn.Module = ColumnParallelLinear(
        inputs, outputs, bias=False, gather_output=False, init_method=_uninitialized
    )
    return layer


def _row_parallel(inputs: int, outputs: int) -> nn.Module:
    layer: nn.Module = RowParallelLinear(
        inputs, outputs, bias=False, input_is_parallel=True, init_method=_uninitialized
    )
    return layer


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019), in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rotary_frequencies(head_dim: int, length: int) -> torch.Tensor:
    """Unit complex numbers [length, head_dim / 2] that rotate a pair of features at each position.

    RoPE (Su et al., 2021), as `precompute_freqs_cis` in Meta's llama/model.py.
    """
    inverse = 1.0 / (ROPE_THETA ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length).float(), inverse)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates x [tokens, heads, head_dim] by rotary [tokens, head_dim / 2], neighbours in pairs."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary.unsqueeze(1)).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over the paged cache; this rank's heads only."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.wq = _column_parallel(config.dim, config.n_heads * config.head_dim)
        self.wk = _column_parallel(config.dim, config.kv_heads * config.head_dim)
        self.wv = _column_parallel(config.dim, config.kv_heads * config.head_dim)
        self.wo = _row_parallel(config.n_heads * config.head_dim, config.dim)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, backend: AttentionBackend
    ) -> torch.Tensor:
        heads = (len(x), -1, self.head_dim)
        query = apply_rotary(self.wq(x).view(heads), rotary)
        key = apply_rotary(self.wk(x).view(heads), rotary)
        value = self.wv(x).view(heads)
        output: torch.Tensor = self.wo(backend.attend(self.layer, query, key, value).flatten(1))
        return output


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = _column_parallel(config.dim, config.hidden_dim)
        self.w2 = _row_parallel(config.hidden_dim, config.dim)
        self.w3 = _column_parallel(config.dim, config.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return output


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, backend: AttentionBackend
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, backend)
        output: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return output


class Transformer(nn.Module):
    """One rank's shard of the network; its weights are loaded, never initialized."""

    rotary: torch.Tensor

    def __init__(self, config: ModelConfig, context_length: int) -> None:
        super().__init__()
        self.tok_embeddings = _on_meta(
            ParallelEmbedding(config.vocab_size, config.dim, init_method=_uninitialized)
        )
        self.layers = nn.ModuleList(
            _on_meta(TransformerBlock(config, layer)) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = _on_meta(_output_layer(config))
        frequencies = rotary_frequencies(config.head_dim, context_length)
        self.register_buffer("rotary", frequencies, persistent=False)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        backend: AttentionBackend,
    ) -> torch.Tensor:
        """One step over a flat batch.

        Args:
            tokens: token ids [num_tokens], sequence after sequence.
            positions: position of each token in its own sequence [num_tokens].
            logit_rows: indices into the batch of the tokens whose logits are wanted [num_logits].
            backend: holds the cache, and the plan of this step.

        Returns:
            Logits [num_logits, vocab] in float32, equal on all ranks.
        """
        x = self.tok_embeddings(tokens)  # [num_tokens, dim]
        rotary = self.rotary[positions]
        for layer in self.layers:
            x = layer(x, rotary, backend)
        logits: torch.Tensor = self.output(self.norm(x[logit_rows]))
        return logits.float()


def _output_layer(config: ModelConfig) -> nn.Module:
    layer: nn.Module = ColumnParallelLinear(
        config.dim, config.vocab_size, bias=False, init_method=_uninitialized
    )
    return layer


def _on_meta(module: nn.Module) -> nn.Module:
    """Gives back the memory of a fresh layer: fairscale allocates it on the default device."""
    return module.to("meta")


def load_network(
    config: ModelConfig,
    context_length: int,
    weights: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
) -> Transformer:
    """The network with `weights` in place, ready for `forward`; no weight is held twice."""
    network = Transformer(config, context_length)
    network.load_state_dict(dict(weights), strict=True, assign=True)
    return network.requires_grad_(False).eval().to(device)


def local_kv_heads(config: ModelConfig) -> int:
    """Heads of keys and values that this rank holds."""
    return config.kv_heads // int(get_model_parallel_world_size())
