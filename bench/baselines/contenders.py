"""The contenders: every engine in every precision it has, and which of them suit a machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.report import Host

REFERENCE = "chasqui-float32"


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine in one precision."""

    name: str
    engine: str  # a module under bench.baselines.workers
    model: str  # format of its weights: meta, hf, or a GGUF type
    precision: str  # as the worker names it
    bits: int  # per weight: contenders with the same number are compared with each other
    options: Mapping[str, str | bool] = field(default_factory=dict)


def _contenders() -> dict[str, Contender]:
    found = []
    for precision, bits, kind in (("float32", 32, "F32"), ("bfloat16", 16, "BF16")):
        found += [
            Contender(f"chasqui-{precision}", "chasqui", "meta", precision, bits),
            Contender(f"transformers-{precision}", "transformers", "hf", precision, bits),
            Contender(f"llama.cpp-{precision}", "llama_cpp", kind, precision, bits),
        ]
        found += [
            Contender(f"vllm-{mode}-{precision}", "vllm", "hf", precision, bits, {"eager": eager})
            for mode, eager in (("eager", True), ("compiled", False))
        ]
    for precision, bits, kind in (("int8", 8, "Q8_0"), ("int4", 4, "Q4_0")):
        found += [
            Contender(f"chasqui-{precision}", "chasqui", "meta", precision, bits),
            Contender(f"llama.cpp-{kind.lower()}", "llama_cpp", kind, kind, bits),
        ]
    return {contender.name: contender for contender in found}


CONTENDERS: Mapping[str, Contender] = _contenders()


def default_names(host: Host, device: str) -> list[str]:
    """The contenders that suit this machine: its wide type, and the quantized ones."""
    if device == "cuda":
        return ["chasqui-bfloat16", "transformers-bfloat16"]
    return [
        name
        for name, contender in CONTENDERS.items()
        if contender.bits < 16 or contender.precision == host.wide_dtype
    ]


def reference_of(contender: Contender) -> str:
    """Chasqui with as many bits per weight."""
    return next(
        name
        for name, each in CONTENDERS.items()
        if each.engine == "chasqui" and each.bits == contender.bits
    )
