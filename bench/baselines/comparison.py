"""One shape's comparison: prepare, check that all compute the same function, measure in rounds.

Equal tokens would be too much to ask: two tokens may be equally probable up to rounding. A wrong
permutation or a missing norm costs several units of logprob, rounding next to nothing.
"""

import itertools
import random
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.baselines.contenders import CONTENDERS, REFERENCE, Contender
from bench.baselines.environments import Environment, UnavailableError, prepare
from bench.baselines.exports import ensure_model, model_bytes
from bench.baselines.fleet import Fleet, WorkerError, WorkerSpec
from bench.engine.driver import QUANTIZED, Job
from bench.engine.roofline import Network, Rates, Work, measure_rates, measure_read
from bench.report import Host, Row, Value, ratio, spread
from bench.shapes import Shape, random_prompts

GIB = 2**30
PROMPT_SEED = 7
WARM_STEPS = 2
PROMPT_TOKENS, ANSWER_TOKENS = 24, 12  # of the check
# Shortfalls in logprob that rounding explains, by precision. Quantized weights are another
# function: they are reported, not judged.
TOLERANCES = {"float32": 0.01, "bfloat16": 0.25}
# Beside weights and cache: interpreter, libraries, activations.
WORKING_BYTES = 700 * 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """A task for every contender."""

    kind: str  # prefill or decode
    size: int  # tokens of the prompt, or sequences at once

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}"

    def rate(self, seconds: Sequence[float]) -> float:
        """Tokens per second, of the seconds that a worker answered."""
        tokens = self.size if self.kind == "prefill" else self.size * len(seconds)
        return tokens / sum(seconds)

    def bytes(self, network: Network, context: int, steps: int) -> float:
        """Bytes that must be read in decode steps of sequences that begin with `context` tokens."""
        lengths = range(context + 1, context + 1 + steps)
        return sum(network.bytes(Work.decode([length] * self.size)) for length in lengths)


def parse_case(name: str) -> Case:
    """Raises ValueError unless `name` is prefill-N or decode-N."""
    kind, _, size = name.partition("-")
    if kind not in ("prefill", "decode") or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"{name}: name a case as prefill-512 or decode-8")
    return Case(kind, int(size))


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement of a round."""

    round: int
    case: Case
    contender: str
    seed: int  # of the prompts: equal for all contenders of a round and case


def schedule(
    contenders: Sequence[str], cases: Sequence[Case], rounds: int, seed: int
) -> Iterator[Turn]:
    """All turns, round by round, case by case, contenders in shuffled order.

    So a machine that grows slower or warmer does not favour those that came first.
    """
    source = random.Random(seed)
    for number in range(rounds):
        for case in cases:
            prompts = source.getrandbits(32)
            for contender in source.sample(list(contenders), len(contenders)):
                yield Turn(number, case, contender, prompts)


@dataclass(slots=True)
class Comparison:
    """The settings and the state of a comparison."""

    shape: Shape
    ckpt_dir: Path
    host: Host
    args: Namespace  # of `python -m bench.baselines`
    specs: dict[str, WorkerSpec] = field(default_factory=dict)
    infos: dict[str, dict[str, str]] = field(default_factory=dict)
    rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    shares: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def run(self, names: Iterable[str]) -> Iterator[Row]:
        """Prepares the contenders, checks them, and measures all rounds."""
        broken: dict[str, UnavailableError] = {}
        for name in names:
            try:
                self.specs[name] = self._prepared(CONTENDERS[name], broken)
            except UnavailableError as error:
                yield self._drop(name, str(error))
        logs = self.args.work_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with Fleet(int(self.args.memory * GIB), logs, self.host.cores) as fleet:
            yield from self._check(fleet)
            yield from self._measure(fleet)
        yield from rate_rows(self.rates, self.shares)

    def _prepared(self, contender: Contender, broken: dict[str, UnavailableError]) -> WorkerSpec:
        """How to start the contender; an environment that failed once is not tried again."""
        contender.check(self.host)
        if error := broken.get(contender.engine):
            raise error
        try:
            environment = prepare(contender.engine, self.args.work_dir, self.host.unused)
        except UnavailableError as error:
            broken[contender.engine] = error
            raise
        model = ensure_model(contender.model, self.ckpt_dir, self.args.work_dir)
        return self._spec(contender, environment, model)

    def _spec(self, contender: Contender, environment: Environment, model: Path) -> WorkerSpec:
        sequences = max((case.size for case in self.args.cases if case.kind == "decode"), default=1)
        prompt = max((case.size for case in self.args.cases if case.kind == "prefill"), default=1)
        # Room for warm-up steps, and for engines that end their prompts in different steps.
        answer = self.args.steps + WARM_STEPS + sequences
        length = max(prompt, self.args.context + answer, 64) + 16
        tokens = max(length, sequences * (self.args.context + self.args.steps + 32))
        weights = self.shape.parameters * contender.bits // 8
        # Twice the tokens: engines round each sequence up to their own granularity.
        cache = 2 * tokens * self.shape.kv_elements_per_token * 4
        options = {"dtype": self.host.wide_dtype, "cache_gib": -(-cache // GIB)}
        return WorkerSpec(
            contender.name,
            f"bench.baselines.workers.{contender.engine}",
            environment,
            {
                "model": str(model),
                "precision": contender.precision,
                "device": self.args.device,
                "threads": self.host.cores,
                "sequences": sequences,
                "length": length,
                "tokens": tokens,
                "options": {**options, **contender.options},
            },
            # Mapped files count as well.
            max(weights, model_bytes(model)) + cache + WORKING_BYTES,
        )

    def _check(self, fleet: Fleet) -> Iterator[Row]:
        """Every contender's greedy answer, scored by the reference."""
        (prompt,) = self._prompts(1, PROMPT_TOKENS, PROMPT_SEED)
        answers: dict[str, list[int]] = {}
        for name, spec in tuple(self.specs.items()):
            try:
                answers[name] = fleet.call(spec, "greedy", prompt=prompt, count=ANSWER_TOKENS)
                self.infos[name] = fleet.info(spec)
            except WorkerError as error:
                yield self._drop(name, str(error))
        reference = self.specs.get(REFERENCE) or self._spec(
            CONTENDERS[REFERENCE], Environment(), self.ckpt_dir
        )
        for name, answer in answers.items():
            shortfalls = fleet.call(reference, "shortfalls", prompt=prompt, answer=answer)
            same = same_function(name, CONTENDERS[name].precision, shortfalls)
            values = {"worst_shortfall_logprob": max(shortfalls), "same": same}
            yield Row("same function", {"contender": name}, values)
            if same is False:
                yield self._drop(name, "computes another function: see the table `same function`")
        if REFERENCE not in self.specs:
            fleet.stop(REFERENCE)

    def _measure(self, fleet: Fleet) -> Iterator[Row]:
        machine, device = dict[int, Rates](), torch.device(self.args.device)
        for turn in schedule(tuple(self.specs), self.args.cases, self.args.rounds, PROMPT_SEED):
            if turn.round not in machine:
                machine[turn.round] = measure_rates(device, self.host.wide_dtype)
            spec = self.specs.get(turn.contender)
            if spec is None:
                continue
            try:
                if not fleet.warmed(spec, turn.case.name):
                    self._ask(fleet, spec, turn.case, WARM_STEPS, seed=turn.seed ^ 1)
                network = self._network(turn)
                read = measure_read(device) if network else 0.0  # while all workers are stopped
                seconds = self._ask(fleet, spec, turn.case, self.args.steps, turn.seed)
            except WorkerError as error:
                yield self._drop(turn.contender, f"{turn.case.name}: {error}")
                continue
            key, rate = (turn.case.name, turn.contender), turn.case.rate(seconds)
            self.rates.setdefault(key, []).append(rate)
            if network:
                needed = turn.case.bytes(network, self.args.context, len(seconds))
                self.shares.setdefault(key, []).append(needed / sum(seconds) / read)
            text = f"{turn.case.name}: {turn.contender}: {rate:.1f} tokens/s"
            print(f"round {turn.round + 1}: {text}", file=sys.stderr, flush=True)
        yield from _machine_rows(tuple(machine.values()))

    def _ask(
        self, fleet: Fleet, spec: WorkerSpec, case: Case, steps: int, seed: int
    ) -> list[float]:
        if case.kind == "prefill":
            (prompt,) = self._prompts(1, case.size, seed)
            return fleet.call(spec, "prefill", prompt=prompt)
        prompts = self._prompts(case.size, self.args.context, seed)
        return fleet.call(spec, "decode", prompts=prompts, steps=steps)

    def _network(self, turn: Turn) -> Network | None:
        """The bytes that a decode step of Chasqui must read; others have formats of their own."""
        contender = CONTENDERS[turn.contender]
        if contender.engine != "chasqui" or turn.case.kind != "decode":
            return None
        precision = contender.precision
        dtype = self.host.wide_dtype if precision in QUANTIZED else precision
        return Job(self.shape, dtype, torch.device(self.args.device), precision=precision).network

    def _prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        return random_prompts(count, length, self.shape.config.vocab_size, seed)

    def _drop(self, name: str, reason: str) -> Row:
        self.specs.pop(name, None)
        return Row("not measured", {"contender": name}, {"reason": reason})


def same_function(name: str, precision: str, shortfalls: Sequence[float]) -> bool | None:
    """Whether rounding explains the shortfalls; None for quantized weights.

    Raises:
        ValueError: there is not a shortfall per token.
    """
    if len(shortfalls) != ANSWER_TOKENS:
        raise ValueError(f"{name} answered {len(shortfalls)} tokens, not {ANSWER_TOKENS}")
    tolerance = TOLERANCES.get(precision)
    return None if tolerance is None else max(shortfalls) <= tolerance


def rate_rows(
    rates: Mapping[tuple[str, str], Sequence[float]],
    shares: Mapping[tuple[str, str], Sequence[float]],
) -> Iterator[Row]:
    """A row per case and contender; `rates` are tokens per second of each round.

    `shares` are the bytes that had to be read over those that the memory delivers, of Chasqui.
    """
    cases = dict.fromkeys(case for case, _ in rates)
    for case, (name, contender) in itertools.product(cases, CONTENDERS.items()):
        if values := rates.get((case, name)):
            reference = rates.get((case, contender.reference))
            row: dict[str, Value] = {
                **spread("tokens_per_s", values),
                "rounds": len(values),
                "over_chasqui": ratio(values, reference) if reference else None,
            }
            if share := shares.get((case, name)):
                row |= spread("share_of_read_bandwidth", share)
            yield Row(case, {"contender": name}, row)


def _machine_rows(machine: Sequence[Rates]) -> Iterator[Row]:
    """The machine's own rates over the rounds."""
    if machine:
        yield Row("machine", {"rate": "read"}, spread("gb_per_s", [r.read / 1e9 for r in machine]))
        for kind in machine[0].matrix:
            rates = [each.matrix[kind] / 1e9 for each in machine]
            yield Row("machine", {"rate": f"{kind} product"}, spread("gflop_per_s", rates))
