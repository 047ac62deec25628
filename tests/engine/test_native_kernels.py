"""The native kernels against the plain ones; and that a token's result is the same, to the bit, in any company."""

from dataclasses import dataclass

import pytest
import torch

from shared.engine.engine import Engine
from shared.engine.kernels import plain
from shared.engine.kernels.native import NativeKernels
from shared.engine.loading.loader import load_model
from shared.engine.native import build
from shared.engine.native.library import native_library
from shared.engine.pool import KVPool
from shared.engine.sequence import NewToken
from shared.sampling import SamplingParams

from .models import prompt_of, run, sequence_of

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [  # query heads, key heads, key size, value size, block size
    (12, 4, 64, 64, 16),
    (4, 4, 16, 16, 8),
    (10, 2, 128, 128, 32),
    (7, 1, 48, 32, 16),
]
ASKED = [  # window, softcap, whether there are sinks
    (None, None, False),
    (9, None, True),
    (40, 2.0, False),
    (None, 2.0, True),
]


@dataclass
class Case:
    """A layer of a pool, poisoned where nothing was written, and one request's KV in it."""

    kernels: NativeKernels
    keys: torch.Tensor
    values: torch.Tensor
    own_keys: torch.Tensor
    own_values: torch.Tensor
    table: torch.Tensor
    num_heads: int
    options: dict[str, object]

    def queries(self, num_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(num_tokens)
        query = torch.randn(self.num_heads, num_tokens, self.keys.shape[3], generator=generator)
        return query.to(self.keys.dtype).transpose(0, 1)


def case(
    shape: tuple[int, int, int, int, int],
    asked: tuple[int | None, float | None, bool],
    dtype: torch.dtype,
    length: int,
    num_threads: int = 1,
) -> Case:
    library = native_library()
    if library is None:
        pytest.skip("there is no C++ compiler here")
    num_heads, num_kv_heads, key_dim, value_dim, block_size = shape
    generator = torch.Generator().manual_seed(length)
    num_needed = -(-length // block_size)
    per_key, per_value = (block_size * num_kv_heads * dim for dim in (key_dim, value_dim))
    pool = torch.full((num_needed + 3, 32 + per_key + per_value), float("nan")).to(dtype)
    keys = pool[:, 32 : 32 + per_key].view(-1, block_size, num_kv_heads, key_dim)
    values = pool[:, 32 + per_key :].view(-1, block_size, num_kv_heads, value_dim)
    own_keys = torch.randn(length, num_kv_heads, key_dim, generator=generator).to(dtype)
    own_values = torch.randn(length, num_kv_heads, value_dim, generator=generator).to(dtype)
    table = torch.randperm(num_needed + 3, generator=generator)[:num_needed]
    positions = torch.arange(length)
    kernels = NativeKernels(library, dtype, num_threads)
    for view, own in ((keys, own_keys), (values, own_values)):
        kernels.put(
            view,
            own.transpose(0, 1).contiguous().transpose(0, 1),
            table[positions // block_size],
            positions % block_size,
        )
    window, softcap, has_sinks = asked
    sinks = torch.randn(num_heads, generator=generator).to(dtype) if has_sinks else None
    options = {"scale": key_dim**-0.5, "window": window, "softcap": softcap, "sinks": sinks}
    return Case(kernels, keys, values, own_keys, own_values, table.int(), num_heads, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_put(dtype: torch.dtype) -> None:
    made = case(SHAPES[0], ASKED[0], dtype, 37)
    blocks, offsets = made.table[torch.arange(37) // 16].long(), torch.arange(37) % 16
    assert torch.equal(made.keys[blocks, offsets], made.own_keys)
    assert torch.equal(made.values[blocks, offsets], made.own_values)
    assert made.keys.isnan().sum() == made.keys.numel() - made.own_keys.numel()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: tuple[int, ...], dtype: torch.dtype, asked: tuple[int | None, float | None, bool]) -> None:
    made = case(shape, asked, dtype, 100)
    lengths = torch.tensor([1, 7, 16, 17, 64, 99, 100], dtype=torch.int32)
    tables = made.table.expand(len(lengths), -1).contiguous()
    queries = made.queries(len(lengths))
    got = made.kernels.paged_decode(queries, made.keys, made.values, tables, lengths, **made.options)
    expected = plain.paged_decode(queries, made.keys, made.values, tables, lengths, **made.options)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("first", "length"), [(0, 1), (0, 150), (63, 65), (70, 200)])
def test_prefill(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    asked: tuple[int | None, float | None, bool],
    first: int,
    length: int,
) -> None:
    made = case(shape, asked, dtype, length)
    queries = made.queries(length - first)
    got = made.kernels.paged_prefill(queries, made.keys, made.values, made.table, first, **made.options)
    positions, keys = torch.arange(first, length)[:, None], torch.arange(length)
    hidden = keys > positions
    if asked[0] is not None:
        hidden |= keys <= positions - asked[0]
    options = {name: made.options[name] for name in ("scale", "softcap", "sinks")}
    mask = plain.additive(hidden, torch.float32)
    whole = [part.float() for part in (queries.transpose(0, 1), made.own_keys, made.own_values)]
    expected = plain.prefill(*whole, mask, **options).to(dtype)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_company_changes_nothing(dtype: torch.dtype, num_threads: int) -> None:
    """A prompt cut elsewhere, a decode alone, other numbers of threads: the same bits."""
    made = case(SHAPES[0], ASKED[0], dtype, 300, num_threads)
    alone = case(SHAPES[0], ASKED[0], dtype, 300).kernels
    queries = made.queries(300)
    whole = made.kernels.paged_prefill(queries, made.keys, made.values, made.table, 0, **made.options)
    for cut in (1, 17, 64, 250):
        parts = [
            alone.paged_prefill(queries[:cut], made.keys, made.values, made.table, 0, **made.options),
            alone.paged_prefill(queries[cut:], made.keys, made.values, made.table, cut, **made.options),
        ]
        assert torch.equal(torch.cat(parts), whole)
    lengths = torch.tensor([5, 300, 77], dtype=torch.int32)
    tables = made.table.expand(3, -1).contiguous()
    together = made.kernels.paged_decode(queries[:3], made.keys, made.values, tables, lengths, **made.options)
    for row in range(3):
        one = slice(row, row + 1)
        single = alone.paged_decode(queries[one], made.keys, made.values, tables[one], lengths[one], **made.options)
        assert torch.equal(single, together[one])


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.built_library() is None


def test_a_compiler_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "COMPILE", ("--no-such-option",))
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    assert build.built_library() is None
    assert "cannot be built" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_requests_logits_do_not_depend_on_its_company(folders: dict[str, str], dtype: str) -> None:
    """A whole model, alone and among others, in chunks cut elsewhere: the same log probabilities, to the bit."""
    loaded = load_model(folders["llama"], dtype=dtype)
    if loaded.library is None:
        pytest.skip("there is no C++ compiler here")
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=5)
    lengths = (5, 90, 41, 81)  # the last two leave one token over

    def answers(company: tuple[int, ...], max_step_tokens: int) -> dict[str, list[NewToken]]:
        engine = Engine(loaded, KVPool(loaded.layout, 40), max_step_tokens)
        first_block = 0
        for length in company:
            sequence = sequence_of(engine, prompt_of(length), sampling, request_id=str(length), first_block=first_block)
            first_block += len(sequence.blocks)
            engine.add(sequence)
        return run(engine)

    together = answers(lengths, 40)
    for length in lengths:
        for max_step_tokens in (40, 512):
            assert answers((length,), max_step_tokens)[str(length)] == together[str(length)]
