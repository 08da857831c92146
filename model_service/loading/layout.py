"""How the memory of one rank divides between weights, steps and the KV cache."""

from dataclasses import dataclass

import torch

from model_service.engine.limits import EngineLimits
from model_service.loading import distributed
from model_service.loading.draft_model import PROBE_BLOCKS, DraftModel
from model_service.loading.memory import WORKING_MEMORY, MemoryPlan, cache_tokens
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Precision
from model_service.model.attention.backend import CachedAttention, CacheShape
from model_service.model.attention.select import make_attention, prepare_attention
from model_service.model.config import ModelConfig
from serving.errors import StartError

# A cache of no given size holds at most all running sequences at full length, this many times over:
# more would keep what later turns hardly ever ask for.
MAX_CACHE = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """The network, precision and device of a rank, and the sizes that follow from them."""

    options: ReplicaOptions
    config: ModelConfig
    shards: int
    precision: Precision
    device: torch.device
    draft: DraftModel | None = None

    @property
    def shards_on_device(self) -> int:
        """Shards that take their memory from the same device."""
        return 1 if self.device.type == "cuda" else distributed.local_world_size()

    def limits(self, *, weights: int, working: int = WORKING_MEMORY) -> EngineLimits:
        """The engine's limits, with a cache for which all ranks have memory; every rank must ask.

        Args:
            weights: bytes of this rank's that are still to be allocated.
            working: bytes that a step takes.

        Raises:
            StartError: the cache would not hold one sequence.
        """
        options = self.options
        affordable = distributed.min_over_ranks(
            cache_tokens(
                self.device,
                self.shards_on_device,
                weights=weights,
                bytes_per_token=self._cache(blocks=1, block_size=1).bytes(self.precision.kv_dtype),
                working=working,
                draft=None if self.draft is None else self.draft.memory(blocks=1, block_size=1),
            )
        )
        most = MAX_CACHE * options.max_batch_size * options.max_seq_len
        # If not even one sequence is affordable, the memory check says so with its numbers.
        tokens = options.kv_cache_tokens or max(options.max_seq_len, min(affordable, most))
        if tokens < options.max_seq_len:
            raise StartError(
                f"--kv_cache_tokens {tokens} is less than --max_seq_len {options.max_seq_len}: "
                "the cache must hold at least one whole sequence"
            )
        # On the CPU a step is over when it has been launched, and drafts follow known tokens.
        automatic = self.device.type == "cuda" and self.draft is None
        return EngineLimits(
            context_length=options.max_seq_len,
            vocab_size=self.config.vocab_size,
            max_batch_size=options.max_batch_size,
            max_step_tokens=max(options.max_step_tokens, options.max_batch_size),
            blocks=-(-tokens // options.block_size),
            block_size=options.block_size,
            prefix_cache=options.prefix_cache,
            max_stall=options.max_stall,
            draft_tokens=options.draft_tokens,
            lookahead=automatic if options.lookahead == "auto" else options.lookahead == "on",
        )

    def memory(
        self, limits: EngineLimits, weights: int, working: int = WORKING_MEMORY
    ) -> MemoryPlan:
        cache = self._cache(limits.blocks + PROBE_BLOCKS, limits.block_size)
        size = cache.bytes(self.precision.kv_dtype)
        blocks = limits.blocks + PROBE_BLOCKS
        draft = None if self.draft is None else self.draft.memory(blocks, limits.block_size)
        return MemoryPlan(weights, size, limits.blocks * limits.block_size, working, draft)

    def prepare_attention(self) -> None:
        """Raises StartError if the kernels of attention cannot be compiled; that takes minutes."""
        prepare_attention(
            self._cache(PROBE_BLOCKS, self.options.block_size),
            self.precision.dtype,
            self.device,
            self.precision.kv_dtype,
            heads=self.config.n_heads // self.shards,
            batch_invariant=self.precision.batch_invariant,
        )

    def attention(self, blocks: int) -> CachedAttention:
        """A backend with a new cache of `blocks` blocks beside those for the probe."""
        return make_attention(
            self._cache(blocks + PROBE_BLOCKS, self.options.block_size),
            self.precision.dtype,
            self.device,
            self.precision.kv_dtype,
            heads=self.config.n_heads // self.shards,
            max_batch_size=self.options.max_batch_size,
            batch_invariant=self.precision.batch_invariant,
        )

    def _cache(self, blocks: int, block_size: int) -> CacheShape:
        return CacheShape(
            layers=self.config.n_layers,
            blocks=blocks,
            block_size=block_size,
            kv_heads=self.config.kv_heads // self.shards,
            head_dim=self.config.head_dim,
        )
