"""How to load a replica, with the defaults. Imports no PyTorch, so that --help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Switch = Literal["auto", "on", "off"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["auto", "none", "int8", "int4", "fp8"]
CacheDtype = Literal["auto", "fp8"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)  # without slots, so that a default is read as ReplicaOptions.block_size
class ReplicaOptions:
    """Options of `load_replica`; `ModelSettings` explains each one and its range.

    `auto` and None are decided by what the checkpoint and the machine have.
    """

    ckpt_dir: Path
    max_seq_len: int = 512
    max_batch_size: int = 8
    max_step_tokens: int = 512
    max_stall: float = 1.7
    kv_cache_tokens: int | None = None
    prefix_cache: bool = True
    draft_tokens: int = 8
    draft_ckpt_dir: Path | None = None
    lookahead: Switch = "auto"
    block_size: int = 16
    dtype: Dtype = "auto"
    quantize: Quantize = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    batch_invariant: bool = False
    device: Device = "auto"
    threads: int | None = None
    verify_checkpoint: bool = True
    model_name: str | None = None
