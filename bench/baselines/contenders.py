"""Who takes part: every engine in every precision it has, and which of them this machine is for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.baselines.environments import UnavailableError
from bench.host import Host

REFERENCE = "chasqui-float32"


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine in one precision."""

    name: str
    environment: str  # chasqui, or a key of environments.RECIPES
    worker: str  # module under bench.baselines.workers
    model: str  # meta, hf, or a GGUF type
    precision: str  # as the worker names it
    bits: int  # per weight: contenders with the same number are compared with each other
    options: Mapping[str, str | bool] = field(default_factory=dict)
    exact: bool = True  # computes the checkpoint's own weights

    def check(self, host: Host) -> None:
        """Raises UnavailableError when this machine or this build is not for it."""
        if self.precision == "bfloat16" and "bf16" not in host.features:
            raise UnavailableError("the processor does not multiply bfloat16 in hardware")


def _contenders() -> dict[str, Contender]:
    found = []
    for precision, bits, kind in (("float32", 32, "F32"), ("bfloat16", 16, "BF16")):
        found += [
            Contender(f"chasqui-{precision}", "chasqui", "chasqui", "meta", precision, bits),
            Contender(
                f"transformers-{precision}", "transformers", "transformers", "hf", precision, bits
            ),
            Contender(f"llama.cpp-{precision}", "llama_cpp", "llama_cpp", kind, precision, bits),
        ]
        found += [
            Contender(
                f"vllm-{mode}-{precision}", "vllm", "vllm", "hf", precision, bits, {"eager": eager}
            )
            for mode, eager in (("eager", True), ("compiled", False))
        ]
    for precision, bits, kind in (("int8", 8, "Q8_0"), ("int4", 4, "Q4_0")):
        found += [
            Contender(
                f"chasqui-{precision}", "chasqui", "chasqui", "meta", precision, bits, exact=False
            ),
            Contender(
                f"llama.cpp-{kind.lower()}",
                "llama_cpp",
                "llama_cpp",
                kind,
                kind,
                bits,
                exact=False,
            ),
        ]
    return {contender.name: contender for contender in found}


CONTENDERS: Mapping[str, Contender] = _contenders()


def default_names(host: Host) -> list[str]:
    """Those that make sense on this machine: its wide type, and the quantized ones."""
    return [
        name
        for name, contender in CONTENDERS.items()
        if not contender.exact or contender.precision == host.wide_dtype
    ]
