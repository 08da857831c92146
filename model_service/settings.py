"""The model service's settings; each is a flag and a CHASQUI_* variable."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model_service.engine.probe import PROBE_INTERVAL
from serving.settings import Port, ServerSettings

MAX_CONTEXT = 4096  # what Llama 2 was trained on


class ModelSettings(ServerSettings):
    port: Port = 50053
    ckpt_dir: Annotated[
        Path, Field(description="folder with Meta's params.json and consolidated.*.pth")
    ]
    tokenizer_path: Annotated[
        Path | None,
        Field(description="the checkpoint's tokenizer.model; the gateway then refuses another"),
    ] = None
    shards: Annotated[
        int | None,
        Field(
            ge=1,
            description="processes on this machine to cut the model over; default 1, or as many "
            "as torchrun has started",
        ),
    ] = None
    max_seq_len: Annotated[
        int,
        Field(ge=2, le=MAX_CONTEXT, description="most tokens of a prompt and its answer together"),
    ] = 512
    max_batch_size: Annotated[
        int, Field(ge=1, le=1024, description="most sequences that run at once; others wait")
    ] = 8
    max_step_tokens: Annotated[
        int,
        Field(ge=1, le=65536, description="most tokens of one step; long prompts are cut to it"),
    ] = 512
    max_stall: Annotated[
        float,
        Field(
            ge=1.1,
            allow_inf_nan=False,
            description="longest step while streams run, as a multiple of a step without prompts",
        ),
    ] = 1.7
    kv_cache_tokens: Annotated[
        int | None,
        Field(ge=1, description="tokens in the KV cache; default what free memory allows"),
    ] = None
    prefix_cache: Annotated[
        bool, Field(description="do not compute again what begins like an earlier prompt or answer")
    ] = True
    draft_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="most tokens to guess ahead in a step, for sequences that repeat their "
            "text; changes logits by their rounding alone; 0 turns it off; none with lookahead",
        ),
    ] = 8
    lookahead: Annotated[
        Literal["auto", "on", "off"],
        Field(
            description="launch a step before the last one's tokens are read; changes logits "
            "by their rounding alone; auto is on for CUDA"
        ),
    ] = "auto"
    block_size: Annotated[
        int, Field(ge=1, le=256, description="tokens per block of the KV cache")
    ] = 16
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="auto is float16 on CUDA, as in Meta's code, and bfloat16 around int4 and "
            "fp8 weights; on the CPU bfloat16 where it computes in it, else float32"
        ),
    ] = "auto"
    quantize: Annotated[
        Literal["auto", "none", "int8", "int4", "fp8"],
        Field(
            description="weights of linear layers; auto is as the checkpoint stores them; on the "
            "CPU the arithmetic around them is then float32"
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Field(
            description="keys and values in the cache; auto is as they are computed, fp8 takes "
            "half or a quarter of the memory and rounds them"
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="auto is cuda where PyTorch finds a device"),
    ] = "auto"
    shard_timeout: Annotated[
        float,
        Field(
            ge=2 * PROBE_INTERVAL,
            allow_inf_nan=False,
            description="seconds that a shard may keep the others waiting; then the replica ends",
        ),
    ] = 20.0
    threads: Annotated[
        int | None,
        Field(
            ge=1,
            description="CPU threads per shard; default its share of the cores",
        ),
    ] = None
    verify_checkpoint: Annotated[
        bool, Field(description="compare all weights with their checksums before loading")
    ] = True
    model_name: Annotated[
        str | None, Field(description="name that clients see; default the folder's name")
    ] = None
