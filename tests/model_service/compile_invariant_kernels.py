"""Compiles the kernels that are batch-invariant for cards that need not be there; JSON on stdout.

Shapes are 7B's. `all` compiles every kernel and format for two cards, anything else two kernels in
bfloat16.
"""

import json
import sys
from typing import Any

import torch

from model_service.model.cuda import attention, attention_kernel, norm_kernel, product_kernel
from model_service.model.cuda.products import tiles
from model_service.model.cuda.tiled_weight import TiledWeight
from tests.model_service.compile_kernels import compile_kernel

CODES = {
    "none": (torch.bfloat16, "bf16", "bf16"),
    "int8": (torch.int8, "i8", "fp32"),
    "fp8": (torch.float8_e4m3fn, "fp8e4nv", "fp32"),
    "int4": (torch.uint8, "u8", "bf16"),
    "float32": (torch.float32, "fp32", "fp32"),
}
# Outputs, or pairs of them, and inputs of 7B's matrices; what their kernels do beside the product.
ROLES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "heads": (12288, 4096, {"NORMS": True, "QUERIES": 4096, "KEYS": 4096, "PAIRS": 64}),
    "gate": (11008, 4096, {"NORMS": True, "GATES": True}),
    "add": (4096, 11008, {"ADDS": True}),
    "output": (32000, 4096, {}),
}
OFF: dict[str, Any] = dict.fromkeys(("NORMS", "ADDS", "GATES", "NARROWS"), False)
OFF |= dict.fromkeys(("QUERIES", "KEYS", "PAIRS"), 0)


def product(capability: int, form: str, role: str, rows: int) -> dict[str, Any]:
    codes, code_type, scale_type = CODES[form]
    outputs, inputs, does = ROLES[role]
    x = "fp32" if form == "float32" else "bf16"
    weight = TiledWeight(torch.empty(1, dtype=codes, device="meta"), None, outputs, inputs)
    tile = tiles(rows, outputs, weight, normed=does.get("NORMS", False))
    types = dict.fromkeys(("x", "norm_weight", "product", "keys", "values"), f"*{x}")
    types |= {"squares": "*fp32", "angles": "*fp32", "slots": "*i32"}
    types |= {"codes": f"*{code_type}", "scales": f"*{scale_type}"}
    types |= dict.fromkeys(("rows", "outputs", "inputs"), "i32")
    sizes = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "EPS": 1e-5}
    scaled = {"SCALES": form in {"int8", "fp8"}, "FOUR_BITS": form == "int4"}
    options = {"num_stages": tile.stages, "enable_fp_fusion": False}
    constants = sizes | scaled | OFF | does
    made = compile_kernel(
        product_kernel.multiply_tile, capability, types, constants, tile.warps, **options
    )
    return made | {"inputs": tile.inputs, "rows": tile.rows}


def attend(capability: int, x: str, keys: str, shared: int) -> dict[str, Any]:
    types = dict.fromkeys(("query", "output"), f"*{x}") | dict.fromkeys(
        ("keys", "values"), f"*{keys}"
    )
    types |= dict.fromkeys(("parts", "scales"), "*fp32") | dict.fromkeys(("tiles", "pages"), "*i32")
    types |= dict.fromkeys(("first_tile", "splits"), "i32")
    sizes = {"KV_HEADS": 8, "SHARED": shared, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "DIM": 128}
    keys_at_once, stages = attention.read_ahead(in_float32=x == "fp32")
    sizes |= {"ROWS": 16, "KEYS": keys_at_once, "SPLIT": attention.SPLIT}
    constants = sizes | {"NARROWED": keys == "u8", "SCALE": 0.125}
    options = {"num_stages": stages, "enable_fp_fusion": False}
    return compile_kernel(attention_kernel.attend_tile, capability, types, constants, 4, **options)


def others(capability: int) -> list[dict[str, Any]]:
    """The joining of splits, and the two kernels of norms."""
    types = dict.fromkeys(("parts", "scales"), "*fp32") | {"output": "*bf16", "tiles": "*i32"}
    sizes: dict[str, Any] = {"HEAD_DIM": 128, "DIM": 128, "SPLIT": attention.SPLIT}
    join = compile_kernel(
        attention_kernel.join_splits, capability, types | {"splits": "i32"}, sizes, warps=1
    )
    types = dict.fromkeys(("x", "weight", "normed"), "*bf16") | {"dim": "i32"}
    sizes = {"EPS": 1e-5, "BLOCK": 8192}
    norm = compile_kernel(norm_kernel._norm, capability, types, sizes, warps=4)
    types = {"stream": "*bf16", "part": "*bf16", "squares": "*fp32", "dim": "i32"}
    sizes = {"ADDS": True, "BLOCK": 8192}
    return [join, norm, compile_kernel(norm_kernel._add, capability, types, sizes, warps=4)]


def main(everything: bool) -> None:
    capabilities = (80, 90) if everything else (90,)
    forms = tuple(CODES) if everything else ("none",)
    made: dict[str, list[dict[str, Any]]] = {}
    for capability in capabilities:
        for form in forms:
            if form == "fp8" and capability < 89:
                continue
            for role in ROLES if everything else ("gate",):
                name = f"{role}, {form}, {capability}"
                made[name] = [product(capability, form, role, rows) for rows in (1, 64)]
        kinds = [("bf16", "bf16", 1), ("bf16", "bf16", 8), ("bf16", "u8", 1), ("fp32", "fp32", 1)]
        for kind in kinds if everything else kinds[:1]:
            made[f"attend, {kind}, {capability}"] = [attend(capability, *kind)]
        if everything:
            made[f"others, {capability}"] = others(capability)
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1:] == ["all"])
