"""Modules that take others' places compute what those do, and where they cannot be had nothing changes."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from shared.engine.modules import linears
from shared.engine.modules.arena import lay_together
from shared.engine.modules.fast import put_in_fast_modules
from shared.engine.modules.gated import replace_gated_mlps
from shared.engine.modules.last_layer import ForRows
from shared.engine.modules.linears import Int8Linear, NativeLinear, PackedLinear, pack_linears, quantise_linears
from shared.engine.modules.norms import NativeRMSNorm, replace_norms
from shared.engine.modules.rotary import NAME, NativeRotary, replace_rotary
from shared.engine.native.library import Library, native_library

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SMALL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def library() -> Library:
    found = native_library()
    if found is None:
        pytest.skip("there is no C++ compiler here")
    return found


@pytest.fixture(params=[True, False], ids=["native", "oneDNN"])
def either(request: pytest.FixtureRequest) -> Library | None:
    return native_library() if request.param else None


class Scaled(nn.Linear):
    """Does more than multiply."""


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16, bias=False))
    return nn.Sequential(inner, Scaled(16, 16), nn.Linear(16, 7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 13, 33])
@torch.inference_mode()
def test_linears_compute_the_same(either: Library | None, dtype: torch.dtype, num_rows: int) -> None:
    plain, packed = model(dtype), model(dtype)
    assert pack_linears(packed, either) == 3
    rows = torch.randn(1, num_rows, 32).to(dtype)
    torch.testing.assert_close(packed(rows), plain(rows), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [NativeLinear, Int8Linear])
@pytest.mark.parametrize("num_threads", [1, 2])
# The last two suit a matrix unit, where there is one; the very last has its rows in several turns.
@pytest.mark.parametrize(("in_features", "num_rows"), [(80, 70), (192, 70), (4096, 300)])
@torch.inference_mode()
def test_a_row_does_not_depend_on_its_batch(
    library: Library,
    dtype: torch.dtype,
    kind: type[NativeLinear | Int8Linear],
    num_threads: int,
    in_features: int,
    num_rows: int,
) -> None:
    """To the bit: the sums of a row have one order, with any number of rows and threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        plain = nn.Linear(in_features, 100).to(dtype)
        native = kind(plain, library)
        rows = torch.randn(num_rows, in_features).to(dtype)
        together = native(rows)
        error = (together - plain(rows)).abs().max() / plain(rows).abs().max()
        assert error < (0.1 if kind is Int8Linear else TOLERANCE[dtype])
        for batch in (0, 1, 3, 12, 13, 16, 17, 31, 32, 33, 48, 63):
            assert torch.equal(native(rows[:batch]), together[:batch])
            assert torch.equal(native(rows[batch:]), together[batch:])
    finally:
        torch.set_num_threads(before)


def test_only_plain_linears_are_packed(either: Library | None) -> None:
    packed = model(torch.float32)
    pack_linears(packed, either)
    assert isinstance(packed[0][0], NativeLinear if either else PackedLinear)
    assert type(packed[1]) is Scaled


def test_a_weight_that_another_module_uses_stays(either: Library | None) -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "head": nn.Linear(8, 11, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    pack_linears(tied, either)
    assert tied["embedding"](torch.tensor([3])).shape == (1, 8)
    assert type(tied["head"]) is not nn.Linear


@torch.inference_mode()
def test_weights_lie_together_in_order_and_are_the_same(library: Library) -> None:
    packed = model(torch.bfloat16)
    pack_linears(packed, library)
    rows = torch.randn(1, 3, 32).bfloat16()
    before = packed(rows)
    num_bytes = lay_together(packed)
    assert torch.equal(packed(rows), before)
    places = [module.packed.data_ptr() for module in packed.modules() if isinstance(module, NativeLinear)]
    assert places == sorted(places)
    assert places[-1] - places[0] < num_bytes
    assert lay_together(nn.Sequential(nn.Linear(2, 2))) == 0


@pytest.mark.parametrize("fault", [RuntimeError, NotImplementedError, AttributeError])
def test_without_the_means_all_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    def refuse(plain: nn.Linear) -> PackedLinear:
        raise fault("not here")

    monkeypatch.setattr(linears, "PackedLinear", refuse)
    plain = model(torch.float32)
    assert pack_linears(plain, None) == 0
    assert type(plain[0][0]) is nn.Linear


def test_one_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, either: Library | None) -> None:
    for kind in (NativeLinear, PackedLinear):
        monkeypatch.setattr(kind, "forward", lambda self, rows: rows.new_zeros(*rows.shape[:-1], self.out_features))
    assert pack_linears(model(torch.float32), either) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 14])
@torch.inference_mode()
def test_8_bit_weights_lose_little(library: Library, dtype: torch.dtype, num_rows: int) -> None:
    plain = nn.Linear(192, 70).to(dtype)
    rows = torch.randn(1, num_rows, 192).to(dtype)
    error = (Int8Linear(plain, library)(rows) - plain(rows)).float()
    assert error.abs().max() < 0.03 * plain(rows).float().abs().max()
    assert error.std() < 0.01 * plain(rows).float().std()


@torch.inference_mode()
def test_8_bit_weights_are_what_they_should_be_exactly(library: Library) -> None:
    """Weights and rows that 8 bits hold exactly give exact sums."""
    plain = nn.Linear(32, 40, bias=False)
    weights = torch.randint(-127, 128, (40, 32), generator=torch.Generator().manual_seed(0)).float()
    weights[:, 0] = 127
    plain.weight.copy_(weights)
    rows = torch.randint(-127, 128, (5, 32), generator=torch.Generator().manual_seed(1)).float()
    rows[:, 3] = -127
    torch.testing.assert_close(Int8Linear(plain, library)(rows), rows @ weights.T, atol=0.0, rtol=1e-6)


@torch.inference_mode()
def test_what_is_no_number_stays_no_number(library: Library) -> None:
    rows = torch.randn(3, 32)
    rows[1, 5] = float("nan")
    rows[2, 7] = float("inf")
    got = Int8Linear(nn.Linear(32, 40), library)(rows)
    assert got[0].isfinite().all()
    assert got[1:].isnan().all()


def test_8_bit_weights_that_come_out_wrong_are_not_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: torch.Tensor, right: Any = linears.quantised_weights) -> tuple[torch.Tensor, torch.Tensor]:
        quantised, scales = right(weight)
        return quantised, scales * 1.5

    monkeypatch.setattr(linears, "quantised_weights", wrong)
    assert quantise_linears(model(torch.float32), library) == 0


def test_routers_keep_their_weights(library: Library) -> None:
    layer = nn.ModuleDict({"gate": nn.Linear(32, 16), "gate_proj": nn.Linear(32, 16)})
    assert quantise_linears(layer, library) == 1
    assert type(layer["gate"]) is nn.Linear


class LimitedMLP(nn.Module):
    """Like Llama's, with a limit that ordinary rows do not reach."""

    def __init__(self, activation: nn.Module, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 32), nn.Linear(64, 32)
        self.down_proj = nn.Linear(32, 64)
        self.act_fn = activation
        self.limit = limit

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(rows)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(rows))


@pytest.mark.parametrize(
    ("activation", "limit", "num_replaced"),
    [(nn.SiLU(), 7.0, 0), (nn.GELU(), float("inf"), 0), (nn.SiLU(), float("inf"), 1)],
    ids=["limited", "another GELU", "Llama's"],
)
def test_only_gated_mlps_as_we_have_them_are_replaced(
    library: Library, activation: nn.Module, limit: float, num_replaced: int
) -> None:
    holder = nn.Sequential(LimitedMLP(activation, limit))
    pack_linears(holder, library)
    assert replace_gated_mlps(holder, torch.float32) == num_replaced


@torch.inference_mode()
def test_rotary_takes_cos_and_sin_as_they_lie(library: Library) -> None:
    own = type(small(CONFIGS["llama"](), torch.float32).model.layers[0].self_attn).forward.__globals__[NAME]
    ours = NativeRotary(library, torch.float32, own)
    query, key = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    cos, sin = torch.randn(1, 16, 64).transpose(1, 2), torch.randn(1, 16, 64).transpose(1, 2)
    expected = own(query.clone(), key.clone(), cos, sin)
    torch.testing.assert_close(ours(query, key, cos, sin), expected)


def test_what_8_bit_weights_have_no_kernel_for_stays(library: Library) -> None:
    odd = nn.Sequential(nn.Linear(17, 16), nn.Linear(16, 5))
    assert quantise_linears(odd, library) == 1
    assert type(odd[0]) is nn.Linear


class OffByOne(nn.Module):
    """An RMSNorm by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + 1


class OffByOneRMSNorm(OffByOne):
    pass


def test_a_norm_of_another_kind_stays(library: Library) -> None:
    holder = nn.Sequential(OffByOneRMSNorm(), OffByOne())
    assert replace_norms(holder, library) == 0
    assert type(holder[0]) is OffByOneRMSNorm


CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, query_pre_attn_scalar=16),
    "phi3": lambda: Phi3Config(**SMALL, partial_rotary_factor=0.5),
}
REPLACED = {  # linears, norms, MLPs, attention modules
    "llama": (15, 5, 2, 2),
    "qwen3": (15, 9, 2, 2),
    "gemma3": (15, 13, 2, 2),
    "phi3": (9, 5, 2, 2),
}


def small(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.5, 0.5)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_whole_model_computes_the_same(library: Library, name: str, dtype: torch.dtype) -> None:
    plain, fast = small(CONFIGS[name](), dtype), small(CONFIGS[name](), dtype)
    replaced = put_in_fast_modules(fast, library, lambda: None)
    assert (replaced.linears, replaced.norms, replaced.mlps, replaced.rotary) == REPLACED[name]
    token_ids = torch.randint(0, 101, (1, 19), generator=torch.Generator().manual_seed(3))
    expected, got = (each(token_ids, use_cache=False).logits.float() for each in (plain, fast))
    spread = float(expected.max() - expected.min())
    assert float((got - expected).abs().max()) < (1e-5 if dtype == torch.float32 else 0.05) * spread


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("wanted", [[], [18], [0, 7, 18]])
@torch.inference_mode()
def test_the_last_layer_computes_wanted_rows_alone(
    library: Library, name: str, dtype: torch.dtype, wanted: list[int]
) -> None:
    """To the bit, what is computed; the rest is less work."""
    spared, whole = (small(CONFIGS[name](), dtype) for _ in range(2))
    rows = torch.tensor(wanted, dtype=torch.int64)
    assert put_in_fast_modules(spared, library, lambda: rows).of_last_layer == 2
    put_in_fast_modules(whole, library, lambda: None)
    token_ids = torch.randint(0, 101, (1, 19), generator=torch.Generator().manual_seed(3))
    got, expected = (each(token_ids, use_cache=False, logits_to_keep=rows).logits for each in (spared, whole))
    assert got.shape == (1, len(wanted), 101)
    assert torch.equal(got, expected)
    counted: list[int] = []
    last_mlp = next(part for part in reversed(list(spared.modules())) if isinstance(part, ForRows))
    last_mlp.inner.register_forward_hook(lambda _, given, __: counted.append(given[0].shape[1]))
    spared(token_ids, use_cache=False, logits_to_keep=rows)
    assert counted == ([len(wanted)] if wanted else [])


@torch.inference_mode()
def test_the_model_class_is_left_alone(library: Library) -> None:
    """Another model of the same class, in the same process, rotates as ever."""
    fast, other = (small(CONFIGS["llama"](), torch.float32) for _ in range(2))
    own = type(other.model.layers[0].self_attn).forward
    replace_rotary(fast, torch.float32, library)
    assert type(other.model.layers[0].self_attn).forward is own
    assert "forward" not in vars(other.model.layers[0].self_attn)


@torch.inference_mode()
def test_rows_of_another_type_go_to_the_models_own_norm(library: Library) -> None:
    holder = nn.Module()
    holder.norm = small(CONFIGS["llama"](), torch.bfloat16).model.norm
    own = holder.norm
    assert replace_norms(holder, library) == 1
    assert isinstance(holder.norm, NativeRMSNorm)
    rows = torch.randn(1, 3, 64)
    assert torch.equal(holder.norm(rows), own(rows))


@torch.inference_mode()
def test_rows_that_are_no_step_are_computed_whole() -> None:
    """As those that a mixture of experts gives to one of its parts."""
    inner = nn.Linear(8, 4)
    spared = ForRows(inner, lambda: torch.tensor([1, 5]), 4)
    rows = torch.randn(6, 8)
    assert torch.equal(spared(rows), inner(rows))
    step = spared(rows[None])
    assert torch.equal(step[0, [1, 5]], inner(rows[[1, 5]]))
    assert not step[0, [0, 2, 3, 4]].any()
