"""The limits of an engine, and its load."""

from collections.abc import Mapping
from dataclasses import dataclass

from model_service.engine.scheduling.speculation.drafters import DraftCount, Source
from model_service.engine.sequence import GenerationRequest
from serving.request_rules import prompt_violations, token_id_violations


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of one engine."""

    context_length: int  # tokens of one sequence
    vocab_size: int
    max_batch_size: int  # sequences that run at once
    max_step_tokens: int  # tokens that one step computes
    blocks: int
    block_size: int  # tokens per block
    prefix_cache: bool  # whether keys and values outlive the sequence that computed them
    max_stall: float  # longest step while sequences decode, in steps without prompt tokens
    draft_tokens: int  # most drafts for a sequence in a step; with lookahead there are none
    lookahead: bool = False  # whether a step is launched before the last one's tokens are read

    def check(self, request: GenerationRequest) -> None:
        """Raises ValueError, naming the rule, if no engine with these limits accepts `request`."""
        prompt = request.prompt_ids
        broken = [
            *prompt_violations(prompt, self.vocab_size, self.context_length, "prompt_ids"),
            *token_id_violations(sorted(request.stop_ids), self.vocab_size, "stop_ids"),
            *token_id_violations(request.logprob_token_ids, self.vocab_size, "logprob_token_ids"),
        ]
        if broken:
            raise ValueError(f"{broken[0].field}: {broken[0].description}")
        if not 0 <= request.offset < len(prompt):
            raise ValueError("offset must leave at least one token of the prompt")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """State and counters of the engine; `drafts` aside, the names are those of GetLoadResponse."""

    running_sequences: int
    waiting_sequences: int
    total_blocks: int
    free_blocks: int  # cached ones included
    cached_blocks: int  # that no sequence holds
    outstanding_tokens: int  # prompt and answer tokens that may still be computed
    # Since the start:
    steps: int
    preemptions: int
    prompt_tokens: int  # computed
    cached_prompt_tokens: int  # found in the cache
    completion_tokens: int
    drafts: Mapping[Source, DraftCount]

    @property
    def drafted_tokens(self) -> int:
        return sum(count.drafted for count in self.drafts.values())

    @property
    def accepted_tokens(self) -> int:
        """Drafted tokens that sampling then drew."""
        return sum(count.accepted for count in self.drafts.values())
