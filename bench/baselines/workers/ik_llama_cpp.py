"""ik_llama.cpp, a fork of llama.cpp with matrix kernels of its own, in its default settings."""

import ctypes
import importlib
from types import ModuleType

from bench.baselines.protocol import serve
from bench.baselines.workers.llama_cpp import LlamaCppWorker


def with_names_of_llama_cpp() -> ModuleType:
    """The fork's functions, and those that its package lacks or that llama.cpp has renamed."""
    library = importlib.import_module("ik_llama_cpp._ctypes_api")
    pointer, numbers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
    for name, arguments, result in (
        ("llama_print_system_info", [], ctypes.c_char_p),
        ("llama_get_logits", [pointer], numbers),
    ):
        function = getattr(library._lib, name)  # noqa: SLF001  # the package has no other way
        function.argtypes, function.restype = arguments, result
        setattr(library, name, function)
    clear = library.llama_kv_cache_clear
    vars(library)["llama_get_memory"] = lambda context: context
    vars(library)["llama_memory_clear"] = lambda context, _data: clear(context)
    return library


if __name__ == "__main__":
    serve(LlamaCppWorker("ik-llama-cpp-python", with_names_of_llama_cpp()))
