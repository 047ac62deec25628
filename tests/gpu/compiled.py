"""Compiles the Triton kernels for GPUs that need not be here, and prints what became of them as JSON.

In a process of its own, because kernels are either compiled or interpreted in all of a process.
"""

import json
import sys
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shared.engine.kernels import triton_decode

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TYPES = {"scale": "fp32", "tables": "*i32", "lengths": "*i32", "partial": "*fp32", "peaks": "*fp32", "sums": "*fp32"}
OF_THE_MODEL = {"query", "keys", "values", "sinks", "output"}


class Target(NamedTuple):
    """A GPU's compute capability (90 is 9.0), and the heads of a model."""

    capability: int
    dtype: str
    group: int
    key_dim: int
    value_dim: int


def compile_both(target: Target) -> dict[str, dict[str, int]]:
    """Both kernels, with every feature on."""
    tiles = triton_decode.tiles(*target[2:], ELEMENT_BYTES[target.dtype])
    num_stages = tiles.pop("num_stages")
    attend = {"BLOCK_SIZE": 16, "WINDOW": 64, "SOFTCAP": 30.0, "NUM_SPLITS": 32, "MIN_SHARE": 128, "WIDEN": False}
    combine = {name: tiles[name] for name in ("VALUE_DIM", "VALUE_DIM_PADDED")}
    combine.update(HAS_SINKS=True, NUM_SPLITS=32)
    return {
        "attend": build(triton_decode._attend, {**attend, **tiles}, target, num_stages),
        "combine": build(triton_decode._combine, combine, target, num_stages),
    }


def build(kernel: Any, constants: dict[str, object], target: Target, num_stages: int) -> dict[str, int]:
    """Compile one kernel for arguments that are aligned, as those of a pool are."""
    types = {
        name: "constexpr"
        if name in constants
        else f"*{target.dtype}"
        if name in OF_THE_MODEL
        else TYPES.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind not in ("constexpr", "fp32")
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_stages": num_stages, "enable_fp_fusion": True},
    )
    code = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        "machine_code_bytes": len(compiled.asm["cubin"]),
        "matrix_instructions": sum(map(code.count, ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))),
        "wide_loads": code.count("ld.global.v4") + code.count("cp.async.cg"),
    }


if __name__ == "__main__":
    targets = [Target(*entry) for entry in json.loads(sys.argv[1])]
    json.dump([compile_both(target) for target in targets], sys.stdout)
