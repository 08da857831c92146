"""The machine as PyTorch and the model service see it: processor, memory, CUDA."""

import re
from pathlib import Path
from typing import Any

import psutil
import torch

from model_service.loading.memory import free_memory
from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.kernels import without_kernels

_DRIVER = Path("/proc/driver/nvidia/version")


def describe_machine() -> dict[str, Any]:
    """Versions, instructions of the kernels, CUDA devices, and memory in bytes."""
    devices, error = _cuda_devices()
    return {
        "torch": torch.__version__,
        "instructions": instructions(),
        "without_kernels": without_kernels(),
        "threads": torch.get_num_threads(),
        "cuda_build": torch.version.cuda,
        "driver": _driver_version(),
        "devices": devices,
        "cuda_error": error,
        "free_memory": free_memory(torch.device("cpu")),
        "total_memory": psutil.virtual_memory().total,
    }


def _cuda_devices() -> tuple[list[dict[str, Any]], str]:
    """The devices that PyTorch can use, or none and the reason."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build
        return [], str(error).splitlines()[0]
    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(
            {"name": properties.name, "capability": capability, "free": free, "total": total}
        )
    return devices, ""


def _driver_version() -> str | None:
    """The version of NVIDIA's kernel module; None if it is not loaded."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else "of unknown version"
