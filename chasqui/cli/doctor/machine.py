"""Checks the processor, the memory and CUDA.

PyTorch is asked in a process of its own: importing it takes seconds, and a broken installation of
it may end the process that imports it.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from chasqui.cli.doctor.finding import Finding, fine, remark, wrong
from chasqui.cli.doctor.packages import installed_version
from chasqui.cli.doctor.probe import start_probe

PROBE_SECONDS = 120.0  # importing PyTorch from a cold disk takes long
REINSTALL = "pip install --force-reinstall '.[model]' in the source tree"
GIB = 2**30


class MachineProbe:
    """The process that asks PyTorch; started early, so that it runs beside the other checks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if installed_version("torch") is not None and installed_version("psutil") is not None:
            self._process = start_probe("machine")

    def findings(self) -> Iterator[Finding]:
        """Waits for the answer."""
        if self._process is None:
            yield remark("processor", f"{_cores()} cores; kernels are unknown without PyTorch")
            return
        try:
            output, errors = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            yield wrong("PyTorch", f"did not start within {PROBE_SECONDS:.0f} s", REINSTALL)
            return
        if self._process.returncode:
            last = errors.strip().splitlines()[-1:] or [f"status {self._process.returncode}"]
            yield wrong("PyTorch", f"cannot be imported: {last[0]}", REINSTALL)
            return
        yield from _described(json.loads(output))


def _described(machine: Mapping[str, Any]) -> Iterator[Finding]:
    yield _processor(machine)
    yield _cuda(machine)
    free, total = machine["free_memory"] / GIB, machine["total_memory"] / GIB
    yield fine("memory", f"{free:.1f} of {total:.1f} GiB are free")


def _processor(machine: Mapping[str, Any]) -> Finding:
    used = machine["instructions"].split()
    text = f"{_cores()} cores; kernels use {', '.join(used)}"
    if used[0] in {"default", "no avx"}:
        return remark("processor", f"{text}: no AVX2, which is very slow")
    if reason := machine["without_kernels"]:
        return remark(
            "processor",
            f"{text}, but not this package's own kernels ({reason}). PyTorch's serve bfloat16: "
            "slower for few streams, and answers may depend on other requests",
        )
    text += "; this package's own compute bfloat16"
    if "bf16" not in used:
        return fine("processor", f"{text}, slowly: weights are float32, or --quantize int8")
    return fine("processor", text)


def _cuda(machine: Mapping[str, Any]) -> Finding:
    if machine["devices"]:
        shown = ", ".join(
            f"{each['name']} ({each['free'] / GIB:.1f} of {each['total'] / GIB:.1f} GiB free)"
            for each in machine["devices"]
        )
        return fine("CUDA", f"{machine['cuda_build']}, driver {machine['driver']}: {shown}")
    build, driver = machine["cuda_build"], machine["driver"]
    if build is None and driver is None:
        return fine("CUDA", "no NVIDIA driver, and PyTorch is a CPU build: the CPU computes")
    if build is None:
        return wrong(
            "CUDA",
            f"the driver {driver} is there, but PyTorch {machine['torch']} is a CPU build",
            "make the environment anew without TORCH_INDEX: rm -r .venv && make env",
        )
    if driver is None:
        text = f"PyTorch is built for CUDA {build}, and there is no NVIDIA driver: the CPU computes"
        return fine("CUDA", text)
    return wrong(
        "CUDA",
        f"driver {driver} and PyTorch's CUDA {build} are there, but no device can be used: "
        f"{machine['cuda_error']}",
        "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough for this CUDA",
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
