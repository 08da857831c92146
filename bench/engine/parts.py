"""The parts of a decode step on the CPU: the products of its matrices, and all that is around them.

The C library says how long the products of a step took. In turn with plain steps go steps with
instruments, which time each call of the C library and of PyTorch, less the calls inside it, and
slow the Python code down.
"""

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from torch.overrides import TorchFunctionMode

from bench.engine.driver import Driver, Load
from bench.engine.throughput import Loaded
from bench.report import Row, SkippedError, Value, spread
from model_service.engine.sampling.host.step_sampling import HostSampling
from model_service.engine.step.runner import ModelRunner
from model_service.model.cpu.library import find_library

P = ParamSpec("P")
T = TypeVar("T")
MAX_ROWS = 20
# Python code by the function that it is in; the calls that it makes are parts of their own.
PYTHON = {
    "Python: engine": (Driver, "step"),
    "Python: forward pass": (ModelRunner, "execute"),
    "Python: sampling": (HostSampling, "read"),
}


class Stopwatch:
    """The time of calls by name, less the time of the calls inside them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside = [0.0]  # of each call that runs: seconds of the calls that it made

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, with the time of its calls counted under `name`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] += taken - self._inside.pop()
                self._inside[-1] += taken
                self.calls[name] += 1

        return call


class _TimedPyTorch(TorchFunctionMode):
    """Times the functions of PyTorch that Python calls."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = getattr(func, "__name__", str(func))
        return self._watch.timed(f"PyTorch: {name}", func)(*args, **(kwargs or {}))


@contextmanager
def instruments(watch: Stopwatch, library: ctypes.CDLL) -> Iterator[None]:
    """Times the C library's functions, PyTorch's and those of PYTHON."""
    with ExitStack() as stack:
        # The library keeps each function that was looked up as an attribute.
        for name, function in tuple(vars(library).items()):
            if name.startswith("chasqui_"):
                timed = watch.timed(f"C: {name.removeprefix('chasqui_')}", function)
                stack.enter_context(patch.object(library, name, timed))
        for name, (owner, method) in PYTHON.items():
            timed = watch.timed(name, getattr(owner, method))
            # A plain function, so that it is bound to its object like the method that it replaces.
            stack.enter_context(patch.object(owner, method, lambda *a, _f=timed, **k: _f(*a, **k)))
        stack.enter_context(_TimedPyTorch(watch))
        yield


def step_parts(loaded: Loaded, load: Load, steps: int) -> Iterator[Row]:
    """A row for the whole step, and one for each of its parts, the longest first."""
    if loaded.job.device.type != "cpu":
        raise SkippedError("the CPU's; the case profile is for a GPU")
    library = find_library()
    if isinstance(library, str):
        raise SkippedError(f"the kernels that know the time of their products: {library}")
    driver = loaded.driver
    answers = [load.answer] * load.streams
    driver.fill(driver.prompts([load.prompt] * load.streams), answers)
    driver.step()  # the first without prompts
    plain: list[float] = []
    products: list[float] = []
    watches: list[Stopwatch] = []
    for _ in range(steps + 1):
        library.chasqui_product_seconds()  # counts from the last call
        started = time.perf_counter()
        driver.step()
        plain.append(time.perf_counter() - started)
        products.append(library.chasqui_product_seconds())
        watches.append(Stopwatch())
        with instruments(watches[-1], library):
            driver.step()
    for each in (plain, products, watches):
        del each[0]  # paid for what later ones find ready
    driver.clear()
    if not any(products):
        raise SkippedError(f"{loaded.job.weights} is multiplied by PyTorch, which counts no time")
    settings: dict[str, Value] = {"weights": loaded.job.weights, "streams": load.streams}
    whole = median(sum(watch.seconds.values()) for watch in watches)
    yield Row(
        "parts",
        settings,
        {
            **spread("step_ms", [1e3 * each for each in plain]),
            "products_ms": 1e3 * median(products),
            "outside_products_percent": 100 * (1 - median(products) / median(plain)),
            "timed_step_ms": 1e3 * whole,
        },
    )
    names = {name for watch in watches for name in watch.seconds}
    taken = {name: median(watch.seconds[name] for watch in watches) for name in names}
    for name in sorted(names, key=taken.__getitem__, reverse=True)[:MAX_ROWS]:
        yield Row(
            "parts by function",
            {**settings, "function": f"`{name}`"},
            {
                "calls": median(watch.calls[name] for watch in watches),
                "ms": 1e3 * taken[name],
                "percent_of_timed_step": 100 * taken[name] / whole,
            },
        )
