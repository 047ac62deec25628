"""The interpreter takes what a compiler would not, so the kernels are compiled, too, for GPUs that need not be here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: make test-gpu")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""What a program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""
TARGETS = [
    (80, "bf16", 4, 128, 128),
    (80, "fp32", 4, 128, 128),
    (90, "bf16", 4, 128, 128),
    (90, "bf16", 1, 192, 128),  # DeepSeek-V3, expanded
    (90, "bf16", 128, 576, 512),  # and as latents
    (90, "bf16", 71, 64, 64),  # Falcon-7B
    (100, "fp16", 8, 64, 64),
    (120, "bf16", 8, 256, 256),
]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[object, ...], dict[str, dict[str, int]]]:
    """What became of both kernels, by target."""
    environment = {name: entry for name, entry in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compiled", json.dumps(TARGETS)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(zip(TARGETS, json.loads(output), strict=True))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_there_is_machine_code_that_fits(
    compiled: dict[tuple[object, ...], dict[str, dict[str, int]]], target: tuple[int, str, int, int, int]
) -> None:
    for kernel in compiled[target].values():
        assert kernel["machine_code_bytes"] > 0
        assert kernel["shared_bytes"] <= SHARED_BYTES[target[0]]
        assert kernel["wide_loads"] > 0, "16 bytes at a time"
    assert (compiled[target]["attend"]["matrix_instructions"] > 0) == (target[1] != "fp32")
