"""The engines there are, and how their workers are started."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.worker import Precision

FLOATS = ("float32", "bfloat16")
FLOATS_AND_INT8 = (*FLOATS, "int8")


@dataclass(frozen=True)
class Engine:
    """An engine.

    Args:
        name: in tables.
        option: of the command line that gives its Python interpreter; None runs it with this one.
        module: its worker.
        precisions: what it is compared in.
        converts: whether its module converts the model first, called with MODEL FOLDER PRECISION.
    """

    name: str
    option: str | None
    module: str
    precisions: tuple[Precision, ...]
    converts: bool = False


OURS = Engine("pdserve", None, "bench.peers.ours", FLOATS_AND_INT8)
ENGINES = [
    OURS,
    Engine("transformers generate", None, "bench.peers.generate", FLOATS),
    Engine("transformers continuous", None, "bench.peers.continuous", FLOATS),
    Engine("vLLM", "vllm", "bench.peers.vllm_cpu", FLOATS),
    Engine("OpenVINO GenAI", "openvino", "bench.peers.openvino", FLOATS_AND_INT8, converts=True),
    Engine("llama.cpp", "llama-cpp", "bench.peers.llama_cpp", FLOATS_AND_INT8, converts=True),
]


def environment(python: str, threads: int) -> Mapping[str, str]:
    """Variables for a worker: how many threads, and none besides.

    vLLM advises to preload Intel's OpenMP, which comes as a package with it.
    """
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    return {
        **counts,
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
