"""What no engine can beat on this machine: a model's multiplications and reads alone.

Both as fast as anything here does them: `python -m bench.peers.floor PRECISION THREADS` measures and prints, as JSON,
the better of torch's and our own, for matrices that stay in the cache, and for memory that does not.
"""

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.model import kv_bytes_per_token
from bench.peers.process import ROOT
from bench.peers.worker import Precision

ELEMENT_BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
ROUNDS = 30
MEASURED_BYTES = 256 << 20
ROWS, FEATURES = 96, (256, 512, 1024)
"""Of the multiplications: one of the sizes suits the second cache best."""


@dataclass(frozen=True)
class Machine:
    """The most of both that was seen, per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Floor:
    """How long a dense model takes at least.

    Args:
        layers, last_layer, head: parameters of matrices. In the last layer only rows that give a token need be
            computed, but for keys and values, which are left out.
        element_bytes, kv_bytes: of a weight, and of a token's KV.
    """

    machine: Machine
    layers: int
    last_layer: int
    head: int
    element_bytes: int
    kv_bytes: int

    def prefill_ms(self, num_requests: int, context: int) -> float:
        """Until all have a token; without attention."""
        per_request = (self.layers - self.last_layer) * context + self.last_layer + self.head
        return 2000.0 * num_requests * per_request / self.machine.flops_per_s

    def decode_tok_s(self, num_requests: int, context: int) -> float:
        """Of steps that read weights and KV once and multiply meanwhile."""
        matrices = self.layers + self.head
        read_s = (matrices * self.element_bytes + num_requests * context * self.kv_bytes) / self.machine.bytes_per_s
        multiply_s = 2.0 * matrices * num_requests / self.machine.flops_per_s
        return num_requests / max(read_s, multiply_s)


def floor_of(model: str, precision: Precision, threads: int, variables: Mapping[str, str]) -> Floor | None:
    """The floor for a folder with one safetensors file; None for what is no dense model of matrices by layer."""
    shapes = _shapes(Path(model))
    layers = _by_layer(shapes)
    head = shapes.get("lm_head.weight", shapes.get("model.embed_tokens.weight"))
    if not layers or head is None or any("expert" in name for name in shapes):
        return None
    command = [sys.executable, "-m", "bench.peers.floor", precision, str(threads)]
    said = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE).stdout
    kv_bytes = kv_bytes_per_token(model, 4 if precision == "float32" else 2)
    element_bytes = ELEMENT_BYTES[precision]
    of_last = layers[max(layers)]
    return Floor(Machine(**json.loads(said)), sum(layers.values()), of_last, math.prod(head), element_bytes, kv_bytes)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """By the name of each tensor, from the file's header (its length, then JSON)."""
    with (folder / "model.safetensors").open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: told["shape"] for name, told in header.items() if name != "__metadata__"}


def _by_layer(shapes: Mapping[str, list[int]]) -> dict[int, int]:
    """Parameters of matrices by the number of the layer."""
    found: dict[int, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if "layers" in parts and len(shape) == 2:
            number = int(parts[parts.index("layers") + 1])
            found[number] = found.get(number, 0) + math.prod(shape)
    return found


def main() -> None:
    import torch

    precision, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    with torch.inference_mode():
        print(json.dumps({"bytes_per_s": _bytes_per_s(), "flops_per_s": _flops_per_s(precision)}))


def _bytes_per_s() -> float:
    import torch

    from shared.engine.memory import huge_pages

    memory = huge_pages(MEASURED_BYTES).view(torch.float32).fill_(1.0)
    reads: list[Callable[[], object]] = [memory.sum]
    rows = torch.ones(1, FEATURES[-1])
    linear = _native(memory.view(-1, FEATURES[-1]))
    if linear is not None:
        reads.append(lambda: linear(rows))
    return MEASURED_BYTES / min(map(_seconds, reads))


def _flops_per_s(precision: str) -> float:
    return max(_flops_per_s_at(precision, features) for features in FEATURES)


def _flops_per_s_at(precision: str, features: int) -> float:
    import torch

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    rows, weights = torch.randn(ROWS, features).to(dtype), torch.randn(features, features).to(dtype)
    multiplies: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(rows, weights)]
    linear = _native(weights, quantised=precision == "int8")
    if linear is not None:
        multiplies.append(lambda: linear(rows))
    return 2.0 * ROWS * features * features / min(map(_seconds, multiplies))


def _native(weights: Any, *, quantised: bool = False) -> Callable[[Any], object] | None:
    """Our own linear with these weights, where it can be had."""
    import torch

    from shared.engine.modules.linears import Int8Linear, NativeLinear
    from shared.engine.native.library import native_library

    library = native_library()
    if library is None:
        return None
    plain = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weights, requires_grad=False)
    return (Int8Linear if quantised else NativeLinear)(plain, library)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some."""
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
