"""The contenders: every engine in every precision it has, and which of them suit a machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.baselines.environments import UnavailableError
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

    @property
    def reference(self) -> str:
        """The name of Chasqui with as many bits per weight."""
        return next(
            name
            for name, each in CONTENDERS.items()
            if each.engine == "chasqui" and each.bits == self.bits
        )

    def check(self, host: Host) -> None:
        """Raises UnavailableError when this machine is not for the contender."""
        if host.device and self.engine not in ("chasqui", "transformers"):
            raise UnavailableError(f"{self.engine} is built for the CPU here")
        zen = host.processor.startswith("AMD") and "avx512" in host.features
        if self.options.get("zentorch") and not zen:
            raise UnavailableError("vLLM uses zentorch on AMD's processors with AVX-512 alone")
        if not host.device and self.precision == "bfloat16" and "bf16" not in host.features:
            raise UnavailableError("the processor does not multiply bfloat16 in hardware")


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("chasqui-float32", "chasqui", "meta", "float32", 32),
        Contender("transformers-float32", "transformers", "hf", "float32", 32),
        Contender("llama.cpp-float32", "llama_cpp", "F32", "float32", 32),
        Contender("vllm-eager-float32", "vllm", "hf", "float32", 32, {"eager": True}),
        Contender("vllm-compiled-float32", "vllm", "hf", "float32", 32),
        Contender("chasqui-bfloat16", "chasqui", "meta", "bfloat16", 16),
        Contender("transformers-bfloat16", "transformers", "hf", "bfloat16", 16),
        Contender("llama.cpp-bfloat16", "llama_cpp", "BF16", "bfloat16", 16),
        Contender("ik_llama.cpp-bfloat16", "ik_llama_cpp", "BF16", "bfloat16", 16),
        Contender("openvino-bfloat16", "openvino", "hf", "bfloat16", 16),
        Contender("vllm-eager-bfloat16", "vllm", "hf", "bfloat16", 16, {"eager": True}),
        Contender("vllm-compiled-bfloat16", "vllm", "hf", "bfloat16", 16),
        Contender("vllm-zentorch-bfloat16", "vllm", "hf", "bfloat16", 16, {"zentorch": True}),
        Contender("chasqui-int8", "chasqui", "meta", "int8", 8),
        Contender("llama.cpp-q8_0", "llama_cpp", "Q8_0", "Q8_0", 8),
        Contender("ik_llama.cpp-q8_0", "ik_llama_cpp", "Q8_0", "Q8_0", 8),
        Contender("openvino-int8", "openvino", "hf", "int8", 8),
        Contender("chasqui-int4", "chasqui", "meta", "int4", 4),
        Contender("llama.cpp-q4_0", "llama_cpp", "Q4_0", "Q4_0", 4),
        Contender("ik_llama.cpp-q4_0", "ik_llama_cpp", "Q4_0", "Q4_0", 4),
        Contender("openvino-int4", "openvino", "hf", "int4", 4),
    )
}


def default_names(host: Host) -> list[str]:
    """The contenders that suit this machine: its wide type, and the quantized ones."""
    if host.device:
        return ["chasqui-bfloat16", "transformers-bfloat16"]
    return [
        name
        for name, contender in CONTENDERS.items()
        if contender.bits < 16 or contender.precision == host.wide_dtype
    ]
