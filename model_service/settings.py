"""The model service's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from model_service.engine import PROBE_INTERVAL
from model_service.loading.options import (
    CacheDtype,
    Device,
    Dtype,
    Quantize,
    ReplicaOptions,
    Switch,
)
from serving.settings import Port, ServerSettings

# Above the context of any model; the checkpoint's own limit is known when it is opened.
MAX_CONTEXT = 2**24


class ModelSettings(ServerSettings):
    port: Port = 50053
    ckpt_dir: Annotated[
        Path,
        Field(
            description="folder with Meta's params.json and consolidated.*.pth, or with Hugging "
            "Face's config.json and *.safetensors; or a GGUF file"
        ),
    ]
    tokenizer_path: Annotated[
        Path | None,
        Field(description="the tokenizer of the checkpoint; the gateway then refuses another"),
    ] = None
    shards: Annotated[
        int | None,
        Field(
            ge=1,
            description="processes on this machine to split the model over; default 1, or as many "
            "as torchrun has started",
        ),
    ] = None
    max_seq_len: Annotated[
        int,
        Field(
            ge=2,
            le=MAX_CONTEXT,
            description="most tokens of a prompt and its answer together, at most what the "
            "checkpoint was trained for",
        ),
    ] = ReplicaOptions.max_seq_len
    max_batch_size: Annotated[
        int, Field(ge=1, le=1024, description="most sequences that run at once; others wait")
    ] = ReplicaOptions.max_batch_size
    max_step_tokens: Annotated[
        int,
        Field(ge=1, le=65536, description="most tokens of one step; longer prompts take several"),
    ] = ReplicaOptions.max_step_tokens
    max_stall: Annotated[
        float,
        Field(
            ge=1.1,
            allow_inf_nan=False,
            description="longest step while streams run, as a multiple of a step without prompts",
        ),
    ] = ReplicaOptions.max_stall
    kv_cache_tokens: Annotated[
        int | None,
        Field(ge=1, description="tokens in the KV cache; default what free memory allows"),
    ] = ReplicaOptions.kv_cache_tokens
    prefix_cache: Annotated[
        bool, Field(description="reuse keys and values of earlier prompts and answers")
    ] = ReplicaOptions.prefix_cache
    draft_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="most tokens to guess ahead in a step, for sequences that repeat their "
            "text or by the draft model; moves logits by rounding only; 0 turns it off; has no "
            "effect with lookahead",
        ),
    ] = ReplicaOptions.draft_tokens
    draft_ckpt_dir: Annotated[
        Path | None,
        Field(
            description="weights of a smaller model with the same vocabulary, which guesses ahead "
            "where that is faster; the answers stay those of --ckpt_dir; turns lookahead off"
        ),
    ] = ReplicaOptions.draft_ckpt_dir
    lookahead: Annotated[
        Switch,
        Field(
            description="launch a step before the last one's tokens are read; moves logits by "
            "rounding only; auto is on for CUDA without --draft_ckpt_dir"
        ),
    ] = ReplicaOptions.lookahead
    block_size: Annotated[
        int, Field(ge=1, le=256, description="tokens per block of the KV cache")
    ] = ReplicaOptions.block_size
    dtype: Annotated[
        Dtype,
        Field(
            description="auto is float16 on CUDA, as in Meta's code, and bfloat16 with int4 and "
            "fp8 weights; on a CPU it is bfloat16 if the CPU has instructions for it, else float32"
        ),
    ] = ReplicaOptions.dtype
    quantize: Annotated[
        Quantize,
        Field(
            description="format of the linear layers' weights; auto is as the checkpoint stores "
            "them; on a CPU, everything around quantized weights is then float32"
        ),
    ] = ReplicaOptions.quantize
    kv_cache_dtype: Annotated[
        CacheDtype,
        Field(
            description="format of cached keys and values; auto is as they are computed, fp8 takes "
            "half or a quarter of the memory and rounds them"
        ),
    ] = ReplicaOptions.kv_cache_dtype
    batch_invariant: Annotated[
        bool,
        Field(
            description="on CUDA, compute by kernels whose results depend neither on other "
            "requests nor on chunks of a prompt; the CPU's always do so"
        ),
    ] = ReplicaOptions.batch_invariant
    device: Annotated[
        Device, Field(description="auto is cuda if PyTorch finds a CUDA device, else cpu")
    ] = ReplicaOptions.device
    shard_timeout: Annotated[
        float,
        Field(
            ge=2 * PROBE_INTERVAL,
            allow_inf_nan=False,
            description="seconds that a shard may keep the others waiting; then the replica ends",
        ),
    ] = 20.0
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads per shard; default its share of the cores")
    ] = ReplicaOptions.threads
    verify_checkpoint: Annotated[
        bool, Field(description="compare all weights with their checksums before loading")
    ] = ReplicaOptions.verify_checkpoint
    model_name: Annotated[
        str | None, Field(description="name that clients see; default the folder's name")
    ] = ReplicaOptions.model_name
