"""One shape's comparison: prepare, check that all compute the same function, measure in rounds."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.baselines import same_function
from bench.baselines.contenders import CONTENDERS, REFERENCE, Contender
from bench.baselines.environments import (
    Environment,
    UnavailableError,
    own_environment,
    prepare,
)
from bench.baselines.fleet import Fleet, Post, WorkerError
from bench.baselines.models import ensure_model, model_bytes
from bench.baselines.protocol import random_prompts
from bench.baselines.rounds import Case, Turn, rows, schedule
from bench.baselines.same_function import Verdict
from bench.host import Host
from bench.limits import Limits, measure_limits
from bench.report import Row, Value
from bench.shapes import Shape
from bench.summary import summarize

GIB = 2**30
PROMPT_SEED = 7
WARM_STEPS = 2
# Beside weights and cache: interpreter, libraries, activations.
WORKING_BYTES = 700 * 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison does."""

    shape: Shape
    ckpt_dir: Path
    work_dir: Path
    host: Host
    cases: tuple[Case, ...]
    rounds: int
    context: int  # tokens that decoding sequences begin with
    steps: int  # decode steps of a measurement
    memory: int  # bytes that all loaded workers may take together


@dataclass(slots=True)
class Comparison:
    """What a comparison has found out so far."""

    plan: Plan
    posts: dict[str, Post] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # contender: why
    infos: dict[str, dict[str, str]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)

    def run(self, names: Iterable[str]) -> None:
        """Prepares the contenders, checks them, and measures all rounds."""
        environments: dict[str, Environment | UnavailableError] = {}
        for name in names:
            try:
                self.posts[name] = self._post(CONTENDERS[name], environments)
            except UnavailableError as error:
                self._drop(name, str(error))
        logs = self.plan.work_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with Fleet(self.plan.memory, logs, self.plan.host.cores) as fleet:
            self._check(fleet)
            self._measure(fleet)

    def rows(self) -> list[Row]:
        """The comparison's tables."""
        references = {
            name: chasqui.name
            for name, each in CONTENDERS.items()
            for chasqui in CONTENDERS.values()
            if chasqui.environment == "chasqui" and chasqui.bits == each.bits
        }
        table = rows(self.rates, references)
        table += [Row("same function", {}, dict(same_function.describe(v))) for v in self.verdicts]
        table += [
            Row("not measured", {"contender": name}, {"reason": reason})
            for name, reason in self.absent.items()
        ]
        return table + [Row("machine", {}, rate) for rate in self._machine()]

    def _post(
        self, contender: Contender, environments: dict[str, Environment | UnavailableError]
    ) -> Post:
        """How to start the contender; an environment that failed once is not tried again."""
        plan = self.plan
        contender.check(plan.host)
        key = contender.environment
        if key not in environments:
            try:
                own = key == "chasqui"
                environments[key] = own_environment() if own else prepare(key, plan.work_dir)
            except UnavailableError as error:
                environments[key] = error
        environment = environments[key]
        if isinstance(environment, UnavailableError):
            raise environment
        model = ensure_model(contender.model, plan.ckpt_dir, plan.work_dir)
        return self._job(contender, environment, model)

    def _job(self, contender: Contender, environment: Environment, model: Path) -> Post:
        plan = self.plan
        # Room for warm-up steps, and for engines that end their prompts in different steps.
        sequences = max((case.size for case in plan.cases if _decodes(case)), default=1)
        answer = plan.steps + WARM_STEPS + sequences
        prefill = max((case.size for case in plan.cases if not _decodes(case)), default=0)
        length = max(prefill, plan.context + answer, 64) + 16
        tokens = max(length, sequences * (plan.context + plan.steps + 32))
        weights = plan.shape.parameters * contender.bits // 8
        # Twice the tokens: engines round each sequence up to their own granularity.
        cache_gib = -(-2 * tokens * plan.shape.kv_elements_per_token * 4 // GIB)
        return Post(
            contender.name,
            f"bench.baselines.workers.{contender.worker}",
            environment,
            {
                "model": str(model),
                "precision": contender.precision,
                "threads": plan.host.cores,
                "sequences": sequences,
                "length": length,
                "tokens": tokens,
                "options": {
                    "dtype": plan.host.wide_dtype,
                    "cache_gib": cache_gib,
                    **contender.options,
                },
            },
            # Mapped files count as well.
            max(weights, model_bytes(model)) + cache_gib * GIB + WORKING_BYTES,
        )

    def _check(self, fleet: Fleet) -> None:
        """Every contender's greedy answer, scored by the reference."""
        vocab_size = self.plan.shape.config.vocab_size
        (prompt,) = random_prompts(1, same_function.PROMPT_TOKENS, vocab_size, PROMPT_SEED)
        answers: dict[str, list[int]] = {}
        for name, post in tuple(self.posts.items()):
            try:
                count = same_function.ANSWER_TOKENS
                answers[name] = fleet.call(post, "greedy", prompt=prompt, count=count)
                self.infos[name] = fleet.info(post)
            except WorkerError as error:
                self._drop(name, str(error))
        reference = self.posts.get(REFERENCE) or self._job(
            CONTENDERS[REFERENCE], own_environment(), self.plan.ckpt_dir
        )
        for name, answer in answers.items():
            shortfalls = fleet.call(reference, "shortfalls", prompt=prompt, answer=answer)
            verdict = same_function.judge(name, CONTENDERS[name].precision, answer, shortfalls)
            self.verdicts.append(verdict)
            _say(f"check: {name}: worst shortfall {verdict.worst_shortfall:.4f}")
            if not verdict.same:
                self._drop(name, "computes another function: see the table `same function`")
        if REFERENCE not in self.posts:
            fleet.stop(REFERENCE)

    def _measure(self, fleet: Fleet) -> None:
        number = -1
        plan = self.plan
        for turn in schedule(tuple(self.posts), plan.cases, plan.rounds, PROMPT_SEED):
            if turn.round > number:
                number = turn.round
                bfloat16 = "bf16" in plan.host.features
                self.limits.append(measure_limits(bfloat16=bfloat16, threads=plan.host.cores))
            if turn.contender in self.posts:
                self._take(fleet, turn)

    def _take(self, fleet: Fleet, turn: Turn) -> None:
        post = self.posts[turn.contender]
        try:
            if not fleet.warmed(post, turn.case.name):
                self._ask(fleet, post, turn.case, WARM_STEPS, seed=turn.seed ^ 1)
            seconds = self._ask(fleet, post, turn.case, self.plan.steps, turn.seed)
        except WorkerError as error:
            self._drop(turn.contender, f"{turn.case.name}: {error}")
            return
        rate = turn.case.rate(seconds)
        self.rates.setdefault((turn.case.name, turn.contender), []).append(rate)
        _say(f"round {turn.round + 1}: {turn.case.name}: {turn.contender}: {rate:.1f} tokens/s")

    def _ask(self, fleet: Fleet, post: Post, case: Case, steps: int, seed: int) -> list[float]:
        if not _decodes(case):
            return fleet.call(post, "prefill", tokens=case.size, seed=seed)
        return fleet.call(
            post, "decode", batch=case.size, context=self.plan.context, steps=steps, seed=seed
        )

    def _drop(self, name: str, reason: str) -> None:
        self.posts.pop(name, None)
        self.absent[name] = reason
        _say(f"{name}: {reason}")

    def _machine(self) -> Iterable[Mapping[str, Value]]:
        """The machine's rates over the rounds."""
        if not self.limits:
            return
        series = {"read GB/s": [limits.read / 1e9 for limits in self.limits]}
        for kind in self.limits[0].gemm:
            series[f"{kind} GEMM GFLOP/s"] = [limits.gemm[kind] / 1e9 for limits in self.limits]
        for name, values in series.items():
            yield {"rate": name, **asdict(summarize(values))}


def _decodes(case: Case) -> bool:
    return case.kind == "decode"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
