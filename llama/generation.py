"""`Llama`: the methods of Meta's llama/generation.py, on Chasqui's engine.

This is the one place that composes the project's rooms in one process. Under torchrun every rank
calls the same methods with the same arguments, as with Meta's code; rank 0 leads the engine, and
its results are what every rank returns. docs/differences.md lists what differs from Meta's.
"""

import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llama.types import ChatPrediction, CompletionPrediction, Dialog, Generation, Message

if TYPE_CHECKING:
    from client import Tls
    from gateway.dialog import Message as DialogMessage
    from llama.remote import RemoteLlama
    from model_service.engine.sequence import GenerationRequest
    from model_service.replica import Replica
    from tokenizer_service.tokenizer import Tokenizer


class Llama:
    """A model in this process (and its peers under torchrun)."""

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
    ) -> "Llama":
        """Loads a checkpoint in Meta's format, on CUDA where there is one and else on the CPU.

        Args:
            ckpt_dir: folder with params.json and consolidated.*.pth, any number of files.
            tokenizer_path: the checkpoint's tokenizer.model.
            max_seq_len: most tokens of a prompt and its answer together.
            max_batch_size: most sequences that run at once; further prompts of a call wait.
            model_parallel_size: shards; must be the number of processes, which is the default.
            seed: makes the samplings of this object repeatable; must be equal on all ranks.

        Raises:
            StartError: the checkpoint, the tokenizer or the machine does not allow it.
        """
        from model_service.replica import ReplicaOptions, load_replica
        from serving.errors import StartError
        from tokenizer_service.tokenizer import Tokenizer

        started = time.monotonic()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if model_parallel_size not in (None, processes):
            raise StartError(
                f"model_parallel_size is {model_parallel_size}, but {processes} processes run: "
                f"start with torchrun --nproc_per_node {model_parallel_size}"
            )
        tokenizer = Tokenizer(tokenizer_path)
        options = ReplicaOptions(
            Path(ckpt_dir), max_seq_len=max_seq_len, max_batch_size=max_batch_size
        )
        replica = load_replica(options)
        if replica.info.vocab_size != tokenizer.n_words:
            raise StartError(
                f"{tokenizer_path} has {tokenizer.n_words} pieces, the checkpoint in {ckpt_dir} "
                f"{replica.info.vocab_size} rows: name the tokenizer that belongs to it"
            )
        if not replica.is_leader:
            # As in Meta's build: a script under torchrun prints once.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        print(f"Loaded in {time.monotonic() - started:.2f} seconds")
        return Llama(replica, tokenizer, seed)

    @staticmethod
    def connect(
        target: str = "127.0.0.1:50051",
        timeout: float | None = None,
        *,
        tls: "Tls | None" = None,
        api_key: str | None = None,
    ) -> "RemoteLlama":
        """The same methods over gRPC, answered by the gateway at `target`.

        Args:
            target: host:port.
            timeout: seconds that a call may take; None is without limit.
            tls: encryption, a `client.Tls`; None is plaintext.
            api_key: for a gateway that asks for one; by default the variable CHASQUI_API_KEY's.
        """
        from llama.remote import RemoteLlama

        key = api_key or os.environ.get("CHASQUI_API_KEY") or None
        return RemoteLlama(target, timeout, tls=tls, api_key=key)

    def __init__(self, replica: "Replica", tokenizer: "Tokenizer", seed: int) -> None:
        self.tokenizer = tokenizer
        self._replica = replica
        self._engine = replica.engine() if replica.is_leader else None
        self._seeds = random.Random(seed)  # noqa: S311  # repeatable is the point

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Generation:
        """Generates from token ids.

        Args:
            prompt_tokens: the prompts, BOS included.
            max_gen_len: most tokens of an answer; each prompt gets its own budget.
            temperature: divides the logits; 0 is greedy.
            top_p: mass of the most probable tokens that are kept.
            logprobs: whether to return logprobs.
            echo: whether the prompt is part of what is returned.

        Returns:
            Token ids per prompt, and with `logprobs` their logprobs, else None.

        Raises:
            ValueError: a prompt is empty, longer than max_seq_len, or holds an unknown id.
            RuntimeError: the network gave logits that are not finite.
        """
        from model_service.engine.sequence import GenerationRequest, SamplingParams

        requests = [
            GenerationRequest(
                request_id=index,
                prompt_ids=tuple(prompt),
                max_gen_len=max_gen_len,
                sampling=SamplingParams(temperature, top_p, seed=self._seeds.getrandbits(64)),
                stop_ids=frozenset([self.tokenizer.eos_id]),
                logprobs=logprobs,
                prompt_logprobs=logprobs and echo,
            )
            for index, prompt in enumerate(prompt_tokens)
        ]
        # On every rank before any of them waits for another: all fail, or none.
        for request in requests:
            self._replica.limits.check(request)
        results = self._run(requests)
        if results.errors:
            raise RuntimeError(results.errors[0])
        if logprobs:
            return results.ids, results.logprobs
        prompts = prompt_tokens if echo else [[] for _ in prompt_tokens]
        return [[*p, *ids] for p, ids in zip(prompts, results.ids, strict=True)], None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continues each prompt; arguments as in `generate`, `max_gen_len` up to the context."""
        encoded = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        ids, scores = self.generate(
            encoded, self._budget(max_gen_len), temperature, top_p, logprobs, echo
        )
        if scores is None:
            return [{"generation": self.tokenizer.decode(tokens)} for tokens in ids]
        return [
            {
                "generation": self.tokenizer.decode(tokens),
                "tokens": [self.tokenizer.decode(token) for token in tokens],
                "logprobs": values,
            }
            for tokens, values in zip(ids, scores, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answers each dialog; arguments as in `text_completion`.

        A dialog with a special tag is answered with the refusal text, as in Meta's code, but
        without being run: its tokens and logprobs are empty.

        Raises:
            ValueError: a dialog breaks the order of roles; the message names the message.
        """
        from gateway.dialog import UNSAFE_ERROR, has_special_tags

        messages = [_checked(dialog, f"dialogs[{i}]") for i, dialog in enumerate(dialogs)]
        safe = [i for i, dialog in enumerate(messages) if not has_special_tags(dialog)]
        prompts = [_encode(messages[i], self.tokenizer) for i in safe]
        ids, scores = self.generate(
            prompts, self._budget(max_gen_len), temperature, top_p, logprobs
        )
        predictions = [_prediction(UNSAFE_ERROR, [], [] if logprobs else None) for _ in dialogs]
        for place, index in enumerate(safe):
            pieces = [self.tokenizer.decode(token) for token in ids[place]] if logprobs else []
            values = None if scores is None else scores[place]
            predictions[index] = _prediction(self.tokenizer.decode(ids[place]), pieces, values)
        return predictions

    def _budget(self, max_gen_len: int | None) -> int:
        return self._replica.limits.context_length - 1 if max_gen_len is None else max_gen_len

    def _run(self, requests: "list[GenerationRequest]") -> "_Results":
        """What the requests gave, equal on all ranks."""
        if self._engine is None:
            self._replica.runner.follow()
            return _broadcast(_Results([], [], []))
        results = _Results([[] for _ in requests], [[] for _ in requests], [])
        for request in requests:
            self._engine.add(request)
        while self._engine.has_work:
            for output in self._engine.step():
                index = cast("int", output.request_id)
                results.ids[index] += output.ids
                results.logprobs[index] += (entry.logprob for entry in output.logprobs)
                if output.error:
                    results.errors.append(output.error)
        self._replica.runner.release_followers()
        return results if self._replica.info.shards == 1 else _broadcast(results)


@dataclass(frozen=True, slots=True)
class _Results:
    """Of each request, and the errors of those that failed."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    errors: list[str]


def _broadcast(results: _Results) -> _Results:
    """Rank 0's results, on every rank."""
    import torch.distributed as dist

    shared = [results]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _checked(dialog: Dialog, path: str) -> "list[DialogMessage]":
    from gateway.dialog import Message as DialogMessage
    from gateway.dialog import violations

    messages = [DialogMessage(message["role"], message["content"]) for message in dialog]
    broken = violations(messages, path)
    if broken:
        raise ValueError("; ".join(f"{each.field}: {each.description}" for each in broken))
    return messages


def _encode(dialog: "list[DialogMessage]", tokenizer: "Tokenizer") -> list[int]:
    from gateway.dialog import render

    return [
        token
        for segment in render(dialog)
        for token in tokenizer.encode(segment.text, bos=segment.bos, eos=segment.eos)
    ]


def _prediction(content: str, tokens: list[str], logprobs: list[float] | None) -> ChatPrediction:
    generation = Message(role="assistant", content=content)
    if logprobs is None:
        return {"generation": generation}
    return {"generation": generation, "tokens": tokens, "logprobs": logprobs}
