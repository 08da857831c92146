"""Compiles the Triton kernels for cards that need not be there; what each takes, as JSON on stdout.

Its compiler and NVIDIA's assembler come with Triton. Arguments are as a call would have them:
pointers and sizes that 16 divides.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_service.model.cuda import rotation_kernel
from model_service.model.cuda import weight_kernels as kernels

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FP8_SINCE = 89  # compute capability 8.9
# Outputs, inputs: 7B's, of both widths of tiles.
WEIGHTS = [(4096, 11008), (22016, 4096)]


def compile_kernel(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    **options: Any,
) -> dict[str, Any]:
    """The resources of a variant, and the instructions and layouts in which it multiplies."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "rows"},
    )
    options = {"num_warps": warps, "num_stages": 4} | options
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "capability": capability,
        "shared": made.metadata.shared,
        "registers": int(registers) * 32 * warps,
        "spilled": int(stack),
        "matrix_units": len(re.findall(r"\b(?:wg)?mma\.", made.asm["ptx"])),
        "copies_ahead": made.asm["ptx"].count("cp.async.cg"),
        "instructions": sorted(set(re.findall(r"\b(?:wg)?mma\.[\w.]*\.m\w+", made.asm["ptx"]))),
        "steps_of_a_sum": longest_sum(made.asm["ptx"]),
        "order_in_lanes": sorted(set(re.findall(r"kWidth = (\d+)", made.asm["ttgir"]))),
    }


def longest_sum(ptx: str) -> int:
    """The most matrix instructions that add to one register, one after the other."""
    steps: dict[str, int] = {}
    for registers in re.findall(r"\bmma\.sync[^{]*\{([^;]*);", ptx):
        parts = [re.findall(r"%\w+", part) for part in registers.split("{")]
        for result, added in zip(parts[0], parts[-1], strict=True):
            steps[result] = steps.get(added, 0) + 1
    return max(steps.values(), default=0)


def products(capability: int, x: str, codes: str) -> list[dict[str, int]]:
    shapes = {
        kernels.tiles(rows, outputs, inputs) for rows in (1, 32, 64) for outputs, inputs in WEIGHTS
    }
    types = {"x": f"*{x}", "codes": f"*{codes}", "scales": "*fp32", "product": f"*{x}"}
    types |= dict.fromkeys(("rows", "outputs", "inputs"), "i32")
    return [
        compile_kernel(
            kernels._multiply,
            capability,
            types,
            {"ROWS": row_tile, "OUTPUTS": output_tile, "INPUTS": at_once},
            warps,
        )
        for at_once, row_tile, output_tile, warps in sorted(shapes)
    ]


def rotation(capability: int, heads: str, narrows: int) -> dict[str, int]:
    types = dict.fromkeys(("query", "key", "value", "rotated"), f"*{heads}")
    types |= {"angles": "*fp32", "keys": "*u8" if narrows else f"*{heads}"}
    types |= {"values": types["keys"], "slots": "*i32"}
    types |= dict.fromkeys(("query_stride", "key_stride", "value_stride", "rotated_stride"), "i32")
    sizes = {"QUERIES": 32, "KV_HEADS": 8, "HEADS": rotation_kernel._HEADS, "PAIRS": 64}
    constants = sizes | {"ROTATES": 1, "NARROWS": narrows}
    return compile_kernel(rotation_kernel._rotate_and_write, capability, types, constants, warps=1)


def main() -> None:
    kinds = [(80, "fp16", "i8"), (90, "bf16", "i8"), (90, "bf16", "fp8e4nv")]
    every = {"_multiply": [made for kind in kinds for made in products(*kind)]}
    types = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "columns": "i32"}
    constants = {"BLOCK": kernels._ROW_BLOCK}
    every["_fp8_rows"] = [
        compile_kernel(kernels._fp8_rows, capability, types, constants, warps=8)
        for capability in (FP8_SINCE, 90)
    ]
    types = {"tiles_": "*i32", "scales": "*bf16", "weight": "*bf16"}
    types |= dict.fromkeys(("outputs", "inputs"), "i32")
    constants = {"PAIRS": 4, "BLOCK": kernels._UNPACKED_BLOCK}
    every["_unpack_int4"] = [
        compile_kernel(kernels._unpack_int4, capability, types, constants, warps=4)
        for capability in (80, 90)
    ]
    every["_rotate_and_write"] = [
        rotation(capability, heads, narrows)
        for capability, heads in ((80, "fp16"), (90, "bf16"))
        for narrows in (0, 1)
    ]
    print(json.dumps(every))


if __name__ == "__main__":
    main()
