"""transformers on the same weights: a static cache, and decode compiled where that works.

The loop is the one that its documentation shows for a static cache: the prompt eagerly, then one
token at a time through `torch.compile(mode="reduce-overhead")`, which replays CUDA graphs. Chasqui
is asked the same just before, in the same process; each has the card for itself.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from bench.baselines.export.hf import hf_config
from bench.baselines.export.layout import hf_name, hf_weight
from bench.engine.driver import Job, free_memory, loaded
from bench.engine.session import FIRST_ORDINARY_ID
from bench.gpu.cases import decode_rates
from bench.gpu.recorder import SkippedError
from bench.gpu.sizes import Sizes
from bench.gpu.weights import RandomWeights
from bench.report import Row
from bench.summary import ratio, summarize
from model_service.loading.precision import DTYPES

Next = Callable[[torch.Tensor, object], torch.Tensor]
# The first call compiles, the second records the graph, the third is the first that replays it.
WARM_UP = 3


def transformers_rows(job: Job, sizes: Sizes, note: Callable[[str], None]) -> Iterator[Row]:
    """Tokens per second of one stream and of a batch, while all of it decodes.

    SkippedError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise SkippedError("transformers is not installed here")
    batches = (1, sizes.streams)
    ours = _chasqui_rates(job, batches, sizes)
    free_memory()
    peer = _Peer(job, sizes)
    for count in batches:
        rates, how = peer.rates(count, note)
        found = summarize(rates)
        yield Row(
            "transformers",
            {"weights": job.dtype, "streams": count, "decode": how},
            {
                "tokens_per_s": found.median,
                "tokens_per_s_low": found.low,
                "tokens_per_s_high": found.high,
                "chasqui_tokens_per_s": summarize(ours[count]).median,
                "chasqui_over_transformers": ratio(ours[count], rates),
            },
        )


def _chasqui_rates(job: Job, batches: Sequence[int], sizes: Sizes) -> dict[int, list[float]]:
    """Tokens per second of each round, by streams."""
    most, length = max(batches), sizes.prompt + sizes.answer
    rates = {}
    with loaded(replace(job, sequences=most, length=length, tokens=most * length)) as driver:
        for streams in batches:
            passages = [
                driver.answer(driver.prompts([sizes.prompt] * streams), sizes.answer)
                for _ in range(sizes.rounds + 1)
            ]
            rates[streams] = decode_rates(passages[1:])
    return rates


class _Peer:
    """transformers' network with weights from the same source, never twice on the device."""

    def __init__(self, job: Job, sizes: Sizes) -> None:
        import transformers  # noqa: PLC0415  # no part of any extra
        from transformers.models.llama.modeling_llama import (  # noqa: PLC0415
            LlamaRotaryEmbedding,
        )

        dtype, shape = DTYPES[job.dtype], job.shape.config
        self._device = job.device
        self._sizes = sizes
        self._config = transformers.LlamaConfig.from_dict(hf_config(shape))
        self._make_cache = transformers.StaticCache
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                self._config, attn_implementation="sdpa", dtype=dtype
            )
        weights = RandomWeights(shape).read_shard(0, 1, dtype, job.device)
        state = {hf_name(name): hf_weight(name, weight, shape) for name, weight in weights}
        model.load_state_dict(state, assign=True)
        # Its frequencies are no parameters: they are still on the meta device.
        model.model.rotary_emb = LlamaRotaryEmbedding(config=self._config).to(job.device)
        self._model: nn.Module = model.eval().requires_grad_(False)

    def rates(self, streams: int, note: Callable[[str], None]) -> tuple[list[float], str]:
        """Tokens per second of each round, and how decode was run."""
        if self._device.type == "cuda":
            compiled: Next = torch.compile(self._next, mode="reduce-overhead", dynamic=False)
            try:
                return self._decode(compiled, streams), "compiled"
            except Exception as error:  # the compiler's, of many kinds; there is a way without it
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                note(f"transformers: {streams} streams: not compiled: {reason}")
        return self._decode(self._next, streams), "eager"

    def _next(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        """The most probable next token of each sequence [streams, 1]."""
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        next_ids: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return next_ids

    @torch.no_grad()
    def _decode(self, decode: Next, streams: int) -> list[float]:
        sizes, rates = self._sizes, []
        cache = self._make_cache(config=self._config, max_cache_len=sizes.prompt + sizes.answer)
        prompts = torch.Generator().manual_seed(streams)
        steps = sizes.answer - WARM_UP - 1
        for number in range(sizes.rounds + 1):
            cache.reset()
            size = (streams, sizes.prompt)
            prompt = torch.randint(
                FIRST_ORDINARY_ID, self._config.vocab_size, size, generator=prompts
            )
            ids = self._next(prompt.to(self._device), cache)
            for _ in range(WARM_UP):
                # What a replayed graph returned, its next replay overwrites.
                ids = decode(ids, cache).clone()
            started = _now(self._device)
            for _ in range(steps):
                ids = decode(ids, cache).clone()
            if number:
                rates.append(streams * steps / (_now(self._device) - started))
        return rates


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
