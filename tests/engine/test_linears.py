"""Packed linears compute what plain ones do, and where they cannot be had nothing changes."""

import pytest
import torch
from torch import nn

from shared.engine import linears
from shared.engine.linears import PackedLinear, pack_linears


class Scaled(nn.Linear):
    """Does more than multiply."""


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16, bias=False))
    return nn.Sequential(inner, Scaled(16, 16), nn.Linear(16, 7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 33])
@torch.inference_mode()
def test_it_computes_the_same(dtype: torch.dtype, num_rows: int) -> None:
    plain, packed = model(dtype), model(dtype)
    assert pack_linears(packed) == 3
    rows = torch.randn(1, num_rows, 32).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed(rows), plain(rows), atol=tolerance, rtol=tolerance)


def test_only_plain_linears_are_packed() -> None:
    packed = model(torch.float32)
    pack_linears(packed)
    assert isinstance(packed[0][0], PackedLinear)
    assert type(packed[1]) is Scaled


def test_a_weight_that_another_module_uses_stays() -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "head": nn.Linear(8, 11, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    pack_linears(tied)
    assert tied["embedding"](torch.tensor([3])).shape == (1, 8)
    assert isinstance(tied["head"], PackedLinear)


@pytest.mark.parametrize("fault", [RuntimeError, NotImplementedError, AttributeError])
def test_without_the_means_all_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    def refuse(plain: nn.Linear) -> PackedLinear:
        raise fault("not here")

    monkeypatch.setattr(linears, "PackedLinear", refuse)
    plain = model(torch.float32)
    assert pack_linears(plain) == 0
    assert type(plain[0][0]) is nn.Linear


def test_one_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, rows: rows.new_zeros(*rows.shape[:-1], self.out_features))
    assert pack_linears(model(torch.float32)) == 0
