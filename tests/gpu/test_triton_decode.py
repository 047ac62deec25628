"""The Triton kernel against the formula: on a GPU where there is one, in Triton's interpreter elsewhere."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.engine.kernels.gpu import gpu_kernels
from shared.engine.loading.loader import load_model
from shared.engine.pool import KVPool
from shared.kv.layout import KVLayout, LayerLayout
from shared.sampling import SamplingParams
from tests.engine.models import Served, ids, mistral, prompt_of, run, save, sequence_of

from . import reference
from .engines import use_graphs

triton_decode = pytest.importorskip(
    "shared.engine.kernels.triton_decode", reason="triton is not installed: make test-gpu"
)
if not torch.cuda.is_available() and isinstance(triton_decode.tl.cdiv, triton_decode.triton.JITFunction):
    pytest.skip("triton was imported before its interpreter could be chosen: make test-gpu", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(slots=True, frozen=True)
class Shape:
    """G query heads share each of H key heads."""

    num_kv_heads: int = 2
    group: int = 3
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32


RAGGED = (1, 15, 16, 17, 0, 64, 133)


@dataclass(slots=True)
class Case:
    """Queries, and KV in a pool: what a request has not written is NaN, in its blocks and in all others."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    sinks: torch.Tensor

    def check(self, *, window: int | None = None, softcap: float | None = None, with_sinks: bool = False) -> None:
        """Both kernels give the same, and nothing in it is NaN."""
        scale = self.query.shape[2] ** -0.5
        given = (self.query, self.keys, self.values, self.tables, self.lengths)
        sinks = self.sinks if with_sinks else None
        result = triton_decode.paged_decode(*given, scale=scale, window=window, softcap=softcap, sinks=sinks)
        expected = reference.paged_decode(*given, scale=scale, window=window, softcap=softcap, sinks=sinks)
        assert result.dtype == self.query.dtype
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def make(shape: Shape, lengths: tuple[int, ...] = RAGGED) -> Case:
    torch.manual_seed(len(lengths))
    num_heads = shape.num_kv_heads * shape.group
    layer = LayerLayout(num_kv_heads=shape.num_kv_heads, key_dim=shape.key_dim, value_dim=shape.value_dim)
    dtype = str(shape.dtype).removeprefix("torch.")
    layout = KVLayout(dtype=dtype, block_size=shape.block_size, layers=(layer, layer))
    max_blocks = layout.num_blocks(max(lengths)) + 1
    pool = KVPool(layout, len(lengths) * max_blocks, DEVICE)
    pool.data.fill_(float("nan"))
    tables = torch.randperm(pool.num_blocks).view(len(lengths), max_blocks).int()
    for table, length in zip(tables, lengths, strict=True):
        positions = torch.arange(length)
        places = (table[positions // shape.block_size].long().to(DEVICE), (positions % shape.block_size).to(DEVICE))
        for views, dim in ((pool.keys, shape.key_dim), (pool.values, shape.value_dim)):
            new = torch.randn(length, shape.num_kv_heads, dim).to(DEVICE, shape.dtype)
            views[1].index_put_(places, new)
    # as attention passes it on: a transposed view
    query = torch.randn(num_heads, len(lengths), shape.key_dim).to(DEVICE, shape.dtype).transpose(0, 1)
    return Case(
        query=query,
        keys=pool.keys[1],
        values=pool.values[1],
        tables=tables.to(DEVICE),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        sinks=torch.randn(num_heads).to(DEVICE, shape.dtype),
    )


@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_kv_heads=2, group=3),  # GQA
        Shape(num_kv_heads=1, group=8),  # MQA
        Shape(num_kv_heads=4, group=1),  # MHA
        Shape(num_kv_heads=1, group=71, key_dim=64, value_dim=64),  # Falcon-7B
        Shape(num_kv_heads=2, group=1, key_dim=192, value_dim=128),  # DeepSeek-V3, expanded
        Shape(num_kv_heads=1, group=40, key_dim=36, value_dim=512),  # more query heads than a program takes
        Shape(key_dim=20, value_dim=12),
        Shape(key_dim=80, value_dim=80),  # Phi-2
        Shape(key_dim=128, value_dim=128),
        Shape(key_dim=256, value_dim=256),  # Gemma
    ],
    ids=str,
)
def test_heads(shape: Shape) -> None:
    make(shape).check()


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    make(Shape(block_size=block_size), (block_size - 1, block_size, block_size + 1, 2 * block_size, 1, 0)).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = make(Shape(dtype=dtype, key_dim=64, value_dim=64))
    case.check()
    case.check(window=20, softcap=20.0, with_sinks=True)


@pytest.mark.parametrize("window", [1, 16, 17, 64, 1000])
def test_window(window: int) -> None:
    make(Shape()).check(window=window)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(softcap: float) -> None:
    make(Shape(key_dim=32)).check(softcap=softcap)


def test_sinks() -> None:
    make(Shape()).check(with_sinks=True)


def test_everything_at_once() -> None:
    make(Shape(key_dim=24, value_dim=40)).check(window=30, softcap=5.0, with_sinks=True)


@pytest.mark.parametrize("num_splits", [1, 2, 4, 16])
@pytest.mark.parametrize("window", [None, 50])
def test_splits(num_splits: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into how many parts KV is cut changes nothing, also where there are more than tokens."""
    monkeypatch.setattr(triton_decode, "choose_num_splits", lambda *_: num_splits)
    monkeypatch.setattr(triton_decode, "MIN_SPLIT_TOKENS", 16)
    make(Shape(), (300, 5, 0, 130)).check(window=window, with_sinks=True)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_tokens_are_zero(with_sinks: bool) -> None:
    case = make(Shape(), (0, 0, 3))
    case.tables[0] = 0
    sinks = case.sinks if with_sinks else None
    given = (case.query, case.keys, case.values, case.tables, case.lengths)
    result = triton_decode.paged_decode(*given, scale=1.0, window=None, softcap=None, sinks=sinks)
    assert torch.equal(result[:2], torch.zeros_like(result[:2]))


def test_nan_of_one_request_is_its_own() -> None:
    case = make(Shape(), (20, 40))
    case.keys[case.tables[0, 0].long()] = float("nan")
    given = (case.query, case.keys, case.values, case.tables, case.lengths)
    result = triton_decode.paged_decode(*given, scale=1.0, window=None, softcap=None, sinks=None)
    assert result[0].isnan().all()
    assert not result[1].isnan().any()


def test_pools_of_more_elements_than_32_bits_count() -> None:
    case = make(Shape(num_kv_heads=1, dtype=torch.float16), (40,))
    stride = 2**30
    for name in ("keys", "values"):
        # 4 GiB of which next to nothing is touched
        memory = torch.empty(2 * stride + 16 * 16, dtype=torch.float16, device=DEVICE)
        far = memory.as_strided((3, 16, 1, 16), (stride, 16, 16, 1))
        far[:] = getattr(case, name)[case.tables[0, :3].long()]
        setattr(case, name, far)
    case.tables = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=DEVICE)
    case.check()


def test_large_scores_do_not_overflow() -> None:
    case = make(Shape(), (40, 200))
    case.query *= 1e4
    case.check()
    case.check(softcap=30.0)


def test_num_splits_depends_on_shapes_alone() -> None:
    assert triton_decode.choose_num_splits(8, 4096, num_sms=132) == 32  # useful: 4,096 / 128
    assert triton_decode.choose_num_splits(16, 131072, num_sms=132) == 32  # wanted: 2 x 132 / 16 = 17
    assert triton_decode.choose_num_splits(512, 131072, num_sms=132) == 1
    assert triton_decode.choose_num_splits(1, 131072, num_sms=132) == triton_decode.MAX_SPLITS


@torch.inference_mode()
def test_a_model_with_this_kernel(tmp_path: Path) -> None:
    """Engine, static input and kernel together: the tokens of transformers' own `generate`."""
    folder = save(mistral(), tmp_path / "model")
    loaded = load_model(folder, dtype="float32", native=False)
    served = Served(loaded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    loaded.attention.kernels = gpu_kernels()
    engine = served.engine(num_blocks=20)
    sizes = use_graphs(engine, num_slots=4, max_model_len=64)
    prompts = {"a": prompt_of(3), "b": prompt_of(30), "c": prompt_of(18)}
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    for number, (request_id, prompt) in enumerate(prompts.items()):
        engine.add(sequence_of(engine, prompt, sampling, request_id=request_id, first_block=5 * number))
    expected = {request_id: served.greedy(prompt, 5) for request_id, prompt in prompts.items()}
    assert {request_id: ids(tokens) for request_id, tokens in run(engine).items()} == expected
    assert sizes == [3, 3, 3, 3]
