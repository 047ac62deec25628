"""Steps of decodes as CUDA graphs: one per bucket, recorded at start, replayed each step.

A step of a small model is many short kernels, and launching them one by one takes longer than they do. Where there are
no graphs, on a CPU or with a model that cannot have them, the same computation runs on the same static input.
"""

import logging

import torch

from shared.engine.batch import Batch
from shared.engine.graphs.decode_inputs import DecodeInputs
from shared.engine.graphs.host_reads import host_reads
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool

NUM_WARM_UPS = 2
"""Computations before recording, in which kernels are compiled and libraries set themselves up."""

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Computes steps that have nothing but decodes.

    Args:
        loaded: the model; its kernels must not read values on the host.
        pool: where KV lives.
        num_slots: the most decodes of a step.
        max_model_len: the most tokens of a request.
        record: False leaves graphs out, to be compared with.
    """

    def __init__(
        self, loaded: LoadedModel, pool: KVPool, num_slots: int, max_model_len: int, *, record: bool = True
    ) -> None:
        self._loaded = loaded
        self._pool = pool
        self._inputs = DecodeInputs(pool, num_slots, pool.layout.num_blocks(max_model_len))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        if record and pool.device.type == "cuda":
            self._record()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch can be computed here."""
        return self._inputs.takes(batch)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """As `LoadedModel.logits`; overwritten by the next step."""
        static = self._inputs.fill(batch)
        recorded = self._graphs.get(static.num_tokens)
        if recorded is None:
            logits = self._loaded.logits(self._pool, static)
        else:
            graph, logits = recorded
            graph.replay()
        return logits[: batch.num_tokens]

    def _record(self) -> None:
        """Record a graph per bucket, unless the model cannot have them."""
        smallest = self._inputs.batches[min(self._inputs.batches)]
        needs = host_reads(lambda: self._loaded.logits(self._pool, smallest))
        if needs:
            log.warning("decode steps run without CUDA graphs: the model calls %s", ", ".join(sorted(needs)))
            return
        try:
            self._record_all()
        except RuntimeError as error:
            self._graphs.clear()
            log.warning("decode steps run without CUDA graphs: %s", error)
            return
        log.info("decode steps are CUDA graphs, of %s rows", ", ".join(map(str, self._inputs.batches)))

    @torch.inference_mode()
    def _record_all(self) -> None:
        """The largest first, so that the others find room in its memory.

        Until a step fills them, all rows are padding: what is computed here harms nobody's KV.
        """
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._pool.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._pool.device):
            for rows, batch in sorted(self._inputs.batches.items(), reverse=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(NUM_WARM_UPS):
                        self._loaded.logits(self._pool, batch)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=memory, stream=stream):
                    logits = self._loaded.logits(self._pool, batch)
                self._graphs[rows] = (graph, logits)
