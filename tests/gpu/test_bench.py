"""The benchmark needs a GPU; that it works is tried with a tiny model on whatever is here."""

import pytest
import torch

from bench.gpu import main, measure, random_llama
from shared.engine.kernels import Kernels, plain

from . import reference

KERNELS = Kernels(decode=reference.paged_decode, prefill=None, put=plain.put)


@pytest.mark.parametrize("record", [True, False])
def test_it_measures(record: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = random_llama((2, 64, 96, 4, 2, 128), "float32", device, KERNELS)
    measured = measure(loaded, device, 3, context=20, num_steps=4, bandwidth=1e9, record=record)
    assert measured.step_s > 0
    # all weights but the embedding, and KV of 30 tokens (20, 8 to warm up, half of 4) of 3 requests, in fp32
    token_bytes = 2 * 2 * 2 * 16 * 4
    assert measured.floor_s * 1e9 == loaded.weight_bytes + 3 * 30 * token_bytes
    assert loaded.weight_bytes == 4 * (loaded.num_parameters - 128 * 64)
    assert "of floor" not in str(measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_it_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        main()
