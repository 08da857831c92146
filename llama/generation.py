"""`Llama`: the methods of Meta's llama/generation.py, on Chasqui's engine.

Only this module composes tokenizer and engine in one process. Under torchrun every rank calls the
same methods with the same arguments, as with Meta's code. Rank 0 leads the engine, and every rank
returns its results. docs/clients/llama.md lists the differences from Meta's code.
"""

import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama.arguments import Arguments, Sampling, checked, refuse
from llama.prompt_format.dialog import UNSAFE_ERROR
from llama.prompt_format.dialog import Message as DialogMessage
from llama.prompt_format.formats import LLAMA2, PromptFormat
from llama.prompt_format.recognition import (
    PromptFormatError,
    choose_format,
    require_control_tokens,
)
from llama.rank import Rank
from llama.turns import Turns
from llama.types import (
    ChatPrediction,
    CompletionPrediction,
    Dialog,
    Generation,
    chat_prediction,
    completion_prediction,
)
from serving.request_rules import DEFAULT_TEMPERATURE, DEFAULT_TOP_P, prompt_violations

if TYPE_CHECKING:
    from client import Tls
    from llama.remote import RemoteLlama
    from model_service.loading.replica import Replica
    from tokenizer_service.tokenizer import Tokenizer

# The text of an answer, its tokens' texts, and with `logprobs` their logprobs.
_Decoded = tuple[str, list[str], list[float] | None]


class Llama:
    """A model in this process, and under torchrun in the processes of all ranks.

    Threads may share one object: their calls take turns in the order in which they arrive. Under
    torchrun only one thread may call, because that order must be the same on all ranks. Ctrl-C on
    rank 0 ends a call after the running step, on all ranks. Ctrl-C on another rank ends the call
    there alone: the other ranks finish it, and the next call is made together.
    """

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        batch_invariant: bool = False,
    ) -> "Llama":
        """Loads a checkpoint, on CUDA where there is one and else on the CPU.

        Args:
            ckpt_dir: folder with Meta's params.json and consolidated.*.pth, any number of files, or
                with Hugging Face's config.json and *.safetensors, or a GGUF file.
            tokenizer_path: the checkpoint's tokenizer.model, tokenizer.json or GGUF file, or a
                folder with one of them.
            max_seq_len: most tokens of a prompt and its answer together, from 2 to the number for
                which the model was trained (4096 for Llama 2).
            max_batch_size: most sequences that run at once, 1 to 1024; further prompts of a call
                wait.
            model_parallel_size: number of shards, equal to the number of processes (the default).
            seed: makes the samplings of this object repeatable; must be equal on all ranks.
            batch_invariant: on CUDA, computes by kernels whose results for a prompt do not depend
                on the other prompts of a call; on the CPU that is always so.

        Raises:
            ValueError: max_seq_len or max_batch_size is out of range, or tokenizer_path is not a
                tokenizer's file. Nothing has been loaded then.
            StartError: the checkpoint, the tokenizer or the machine does not allow it.
        """
        from llama.model_files import embedding_fits
        from model_service.loading.load_replica import load_replica
        from model_service.loading.options import ReplicaOptions
        from model_service.settings import ModelSettings
        from serving.errors import StartError
        from serving.settings import check_value
        from tokenizer_service.open_tokenizer import open_tokenizer

        check_value(ModelSettings, "max_seq_len", max_seq_len)
        check_value(ModelSettings, "max_batch_size", max_batch_size)

        started = time.monotonic()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if model_parallel_size not in (None, processes):
            raise StartError(
                f"model_parallel_size is {model_parallel_size}, but {processes} processes run: "
                f"start the program with python -m model_service.launcher "
                f"--shards {model_parallel_size}"
            )
        tokenizer = open_tokenizer(tokenizer_path)
        try:
            prompt_format = choose_format("auto", tokenizer.chat_template)
            require_control_tokens(prompt_format, tokenizer.control_ids)
        except PromptFormatError as error:
            raise StartError(f"{error}, of a gateway that Llama.connect calls") from error
        options = ReplicaOptions(
            Path(ckpt_dir),
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            batch_invariant=batch_invariant,
        )
        replica = load_replica(options)
        if not embedding_fits(replica.info.vocab_size, tokenizer.n_words):
            raise StartError(
                f"{tokenizer_path} has {tokenizer.n_words} pieces, the checkpoint in {ckpt_dir} "
                f"{replica.info.vocab_size} rows: name the tokenizer that belongs to it"
            )
        if not replica.is_leader:
            # As in Meta's code, a script under torchrun prints once.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        print(f"Loaded in {time.monotonic() - started:.2f} seconds")
        return Llama(replica, tokenizer, seed, prompt_format)

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
            timeout: seconds that a call may take; None for no limit.
            tls: encryption, a `client.Tls`; None for plaintext.
            api_key: for a gateway that asks for one; by default the value of CHASQUI_API_KEY.
        """
        from llama.remote import RemoteLlama

        key = api_key or os.environ.get("CHASQUI_API_KEY") or None
        return RemoteLlama(target, timeout, tls=tls, api_key=key)

    def __init__(
        self,
        replica: "Replica",
        tokenizer: "Tokenizer",
        seed: int,
        prompt_format: PromptFormat = LLAMA2,
    ) -> None:
        self.tokenizer = tokenizer
        self._format = prompt_format
        answer_ends = (tokenizer.control_ids[each] for each in prompt_format.answer_ends)
        self._stop_ids = frozenset((*tokenizer.eos_ids, *answer_ends))
        self._limits = replica.limits
        self._rank = Rank(replica)
        self._turns = Turns(self._rank.use_device)
        self._request_ids = itertools.count()
        self._seeds = random.Random(seed)  # noqa: S311  # repeatable is the point

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Generation:
        """Generates from token ids.

        Args:
            prompt_tokens: the prompts, BOS included.
            max_gen_len: most tokens of each answer. With 0, `logprobs` and `echo`, this scores the
                prompts.
            temperature: divides the logits; 0 and below are greedy.
            top_p: probability mass of the tokens to choose from.
            logprobs: whether to return logprobs.
            echo: whether to return the prompt in front of the answer.

        Returns:
            Token ids per prompt, and with `logprobs` their logprobs, else None.

        Raises:
            ValueError: an argument breaks a rule; the message names each with its path. Nothing
                has run then.
            RuntimeError: the network gave logits that are not finite, or a step failed.
            KeyboardInterrupt: Ctrl-C, on this rank or on rank 0. The call is cancelled, and the
                next one works.
        """

        def call(abandoned: threading.Event) -> Generation:
            prompts, sampling = checked(
                Arguments.token_ids, prompt_tokens, temperature, top_p, max_gen_len
            )
            return self._generate(
                {f"prompt_tokens[{i}]": prompt for i, prompt in enumerate(prompts)},
                sampling,
                abandoned,
                logprobs=logprobs,
                echo=echo,
            )

        return self._turns.run(call)

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continues each prompt.

        Arguments and errors are as in `generate`. By default an answer may fill the context.
        """

        def call(abandoned: threading.Event) -> list[CompletionPrediction]:
            texts, sampling = checked(Arguments.texts, prompts, temperature, top_p, max_gen_len)
            encoded = {
                f"prompts[{i}]": self.tokenizer.encode(text, bos=True, eos=False)
                for i, text in enumerate(texts)
            }
            generation = self._generate(encoded, sampling, abandoned, logprobs=logprobs, echo=echo)
            return [completion_prediction(*each) for each in self._decoded(generation)]

        return self._turns.run(call)

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answers each dialog; arguments and errors are as in `text_completion`.

        As in Meta's code, the answer to a dialog with a special tag is a refusal, but the dialog
        does not run: its tokens and logprobs are empty. Roles out of order are a ValueError that
        names the message: `dialogs[0].messages[1].role`.

        The prompts are in the format of the chat template beside the tokenizer, and in Llama 2's
        where there is none.
        """

        def call(abandoned: threading.Event) -> list[ChatPrediction]:
            read, sampling = checked(Arguments.dialogs, dialogs, temperature, top_p, max_gen_len)
            safe = [i for i, dialog in enumerate(read) if not self._format.has_special_tags(dialog)]
            encoded = {f"dialogs[{i}]": self._encode(read[i]) for i in safe}
            generation = self._generate(encoded, sampling, abandoned, logprobs=logprobs)
            refusal: _Decoded = (UNSAFE_ERROR, [], [] if logprobs else None)
            answers = dict(zip(safe, self._decoded(generation), strict=True))
            return [chat_prediction(*answers.get(i, refusal)) for i in range(len(read))]

        return self._turns.run(call)

    def _generate(
        self,
        prompts: Mapping[str, list[int]],
        sampling: Sampling,
        abandoned: threading.Event,
        *,
        logprobs: bool,
        echo: bool = False,
    ) -> Generation:
        """The result of `generate` for prompts by their paths."""
        from model_service.engine.sequence import GenerationRequest, SamplingParams

        # Every rank checks before it waits for another, so that all of them fail, or none.
        vocab_size, context_length = self._limits.vocab_size, self._limits.context_length
        refuse(
            violation
            for path, prompt in prompts.items()
            for violation in prompt_violations(prompt, vocab_size, context_length, path)
        )
        max_gen_len = sampling.max_gen_len
        if max_gen_len is None:
            max_gen_len = context_length - 1
        requests = [
            GenerationRequest(
                request_id=next(self._request_ids),
                prompt_ids=tuple(prompt),
                max_gen_len=max_gen_len,
                sampling=SamplingParams(
                    sampling.temperature, sampling.top_p, seed=self._seeds.getrandbits(64)
                ),
                stop_ids=self._stop_ids,
                logprobs=bool(logprobs),
                prompt_logprobs=bool(logprobs and echo),
            )
            for prompt in prompts.values()
        ]
        results = self._rank.run(requests, abandoned)
        if results.errors:
            raise RuntimeError(results.errors[0])
        if logprobs:
            return results.ids, results.logprobs
        begun = prompts.values() if echo else [[] for _ in prompts]
        return [[*p, *ids] for p, ids in zip(begun, results.ids, strict=True)], None

    def _encode(self, dialog: Sequence[DialogMessage]) -> list[int]:
        return [
            token
            for segment in itertools.chain.from_iterable(self._format.render(dialog))
            for token in self.tokenizer.encode(
                segment.text, segment.bos, segment.eos, segment.control_token
            )
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of ids; rows that pad the embedding have none."""
        return self.tokenizer.decode([each for each in ids if each < self.tokenizer.n_words])

    def _decoded(self, generation: Generation) -> "list[_Decoded]":
        ids, logprobs = generation
        decode = self._decode
        if logprobs is None:
            return [(decode(tokens), [], None) for tokens in ids]
        return [
            (decode(tokens), [decode([token]) for token in tokens], values)
            for tokens, values in zip(ids, logprobs, strict=True)
        ]
