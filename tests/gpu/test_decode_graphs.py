"""Steps on static input give what ordinary steps give. On a CPU they run as they are; on a GPU they are replayed."""

from pathlib import Path

import pytest
import torch

from shared.engine.batch import Batch, build_batch
from shared.engine.engine import Engine
from shared.engine.graphs.decode_graphs import DecodeGraphs
from shared.engine.graphs.decode_inputs import DecodeInputs, buckets
from shared.engine.graphs.host_reads import host_reads
from shared.engine.kernels import Kernels, plain
from shared.engine.loading.loader import load_model
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.scheduler import PrefillChunk, StepPlan
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams
from tests.engine.models import CONFIGS, ids, prompt_of, run, save, sequence_of

from . import reference
from .engines import use_graphs

LENGTHS = (1, 15, 16, 40, 90)
NUM_SLOTS = 6
MAX_MODEL_LEN = 128
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
NUM_BLOCKS = 60
NAMES = ("llama", "mistral", "Gemma 2", "gpt-oss", "DeepSeek-V3")
"""GQA; with a window; with a soft cap; with sinks and experts; with keys larger than values."""


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("model")
    loaded = load_model(save(CONFIGS[request.param](), folder), dtype="float32", native=False)
    loaded.attention.kernels = Kernels(decode=reference.paged_decode, prefill=None, put=plain.put)
    return loaded


def make_engine(loaded: LoadedModel) -> Engine:
    pool = KVPool(loaded.layout, NUM_BLOCKS)
    for views in (pool.keys, pool.values):
        for view in views:
            view.fill_(float("nan"))  # the trash block, too
    return Engine(loaded, pool, max_step_tokens=512)


def add_all(engine: Engine) -> list[Sequence]:
    sequences: list[Sequence] = []
    first_block = 0
    for number, length in enumerate(LENGTHS):
        # of different ends, so that batches of every size come up
        sampling = GREEDY.model_copy(update={"max_tokens": 4 * number + 2})
        sequence = sequence_of(engine, prompt_of(length), sampling, request_id=str(number), first_block=first_block)
        first_block += len(sequence.blocks)
        engine.add(sequence)
        sequences.append(sequence)
    return sequences


def test_tokens_are_those_of_ordinary_steps(loaded: LoadedModel) -> None:
    ordinary = make_engine(loaded)
    add_all(ordinary)
    expected = {request: ids(tokens) for request, tokens in run(ordinary).items()}

    engine = make_engine(loaded)
    sizes = use_graphs(engine, NUM_SLOTS, MAX_MODEL_LEN)
    add_all(engine)
    assert {request: ids(tokens) for request, tokens in run(engine).items()} == expected
    assert set(sizes) == {1, 2, 3, 4, 5}


def decodes(loaded: LoadedModel, num_rows: int) -> tuple[Engine, Batch]:
    """An engine after the prompts' step, and its first step of decodes."""
    engine = make_engine(loaded)
    sequences = add_all(engine)
    engine.step()
    batch = build_batch(StepPlan(sequences[:num_rows], []), loaded.layout.block_size, torch.float32)
    return engine, batch


def test_padding_writes_to_the_trash_block_alone(loaded: LoadedModel) -> None:
    engine, batch = decodes(loaded, 3)
    graphs = DecodeGraphs(loaded, engine.pool, NUM_SLOTS, MAX_MODEL_LEN)
    before = engine.pool.data.clone()
    logits = graphs.logits(batch)
    assert not logits.isnan().any()
    written = ~(before == engine.pool.data) & ~(before.isnan() & engine.pool.data.isnan())
    assert set(written.any(1).nonzero().flatten().tolist()) == set(batch.blocks.tolist())
    assert not engine.pool.keys[0][engine.pool.trash_block, 0].isnan().any()
    # one slot per request, in keys and values of all layers
    assert written.sum() == 3 * engine.pool.layout.block_elements // engine.pool.layout.block_size


def test_the_step_needs_nothing_of_the_host(loaded: LoadedModel) -> None:
    engine, batch = decodes(loaded, 5)
    inputs = DecodeInputs(engine.pool, NUM_SLOTS, 8)
    static = inputs.fill(batch)
    assert host_reads(lambda: loaded.logits(engine.pool, static)) == set()


def test_addresses_stay(loaded: LoadedModel) -> None:
    engine, batch = decodes(loaded, 5)
    inputs = DecodeInputs(engine.pool, NUM_SLOTS, 8)

    def addresses() -> list[list[int]]:
        parts = ("token_ids", "positions", "blocks", "offsets", "tables", "lengths", "logit_rows")
        return [[getattr(static, part).data_ptr() for part in parts] for static in inputs.batches.values()]

    before = addresses()
    assert inputs.fill(batch) is inputs.batches[6]
    assert addresses() == before


def test_rows_that_are_left_over_are_padding(loaded: LoadedModel) -> None:
    engine, five = decodes(loaded, 5)
    _, three = decodes(loaded, 3)
    inputs = DecodeInputs(engine.pool, NUM_SLOTS, 8)
    inputs.fill(five)
    static = inputs.fill(three)
    assert static.num_tokens == static.num_decodes == 4
    assert static.token_ids[:3].tolist() == three.token_ids.tolist()
    assert static.lengths.tolist() == [*three.lengths.tolist(), 0]
    assert static.blocks[3] == engine.pool.trash_block
    for table, own in zip(static.tables, three.tables, strict=False):
        assert table[: len(own)].tolist() == own.tolist()


def test_what_is_not_taken(loaded: LoadedModel) -> None:
    engine, batch = decodes(loaded, 5)
    assert DecodeInputs(engine.pool, 5, 6).takes(batch)
    assert not DecodeInputs(engine.pool, 4, 6).takes(batch), "too many rows"
    assert not DecodeInputs(engine.pool, 5, 5).takes(batch), "too long"
    prompt = sequence_of(engine, prompt_of(3), GREEDY)
    for plan in (StepPlan([], [PrefillChunk(prompt, 3)]), StepPlan([], [])):
        other = build_batch(plan, loaded.layout.block_size, torch.float32)
        assert not DecodeInputs(engine.pool, 5, 6).takes(other), "no decodes"


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(2) == [1, 2]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(64) == [1, 2, 4, 8, 16, 32, 64]
