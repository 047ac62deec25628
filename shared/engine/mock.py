"""The mock engine: an engine that computes nothing, and takes the time that computing would take.

Whatever is around an engine is real with it: scheduling, shared blocks, the pool and its bytes on the wire. Of each
token the pool holds its id, as key, and a digest of all tokens up to it, as value, so that as with real KV everything
before a token is in it. KV is read back before anything is built on it, and what is wrong raises `WrongKV`: blocks that
are handed over in a wrong order, shared by the wrong requests or written to by two are noticed.

Text is noise: the next token is drawn from the seed, the position and the digest, so that a request gives the same
tokens alone, in a batch and after another instance took it over. It is never a stop token, so answers are as long as
`max_tokens` says.
"""

import asyncio
import re
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from shared.engine.engine import AnyEngine, parts
from shared.engine.pool import KVPool, host_bytes
from shared.engine.sampling.sampler import GREEDY_BELOW, Choice
from shared.engine.scheduler import StepPlan
from shared.engine.sequence import Sequence as EngineSequence
from shared.engine.staging import InPlace
from shared.errors import SettingsInvalid
from shared.kv.layout import KVLayout, LayerLayout
from shared.kv.parcel import Parcel
from shared.sampling import LEAST_LOGPROB, SamplingParams
from shared.text.files import resolve_model
from shared.text.model_config import ModelConfig
from shared.text.tokenizer import Tokenizer

DEFAULT_TIMES = "prefill=5ms+0.1ms/token,step=20ms+0.3ms/row,transfer=1ms+5us/token"
"""Like a model of 7 billion parameters in 16 bits on one accelerator, and KV of 128 KB per token over 200 Gbit/s."""

MAX_POOL_TOKENS = 2**19
"""What 64 GB hold with 128 KB per token."""

_PER = {"prefill": "token", "step": "row", "transfer": "token"}
_TERM = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)(?:/(token|row))?")
_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}
_NO_TOKENS = 0x2545F491
"""The digest of an empty text."""
_MULTIPLIER = 0x9E3779B1
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class MockTimes:
    """How long things take, in seconds: each a base, and more for each token or row.

    Args:
        prefill_base_s, prefill_token_s: a step's prefill chunks, together.
        step_base_s, step_row_s: a step's decodes, together.
        transfer_base_s, transfer_token_s: KV on its way to another instance.
    """

    prefill_base_s: float
    prefill_token_s: float
    step_base_s: float
    step_row_s: float
    transfer_base_s: float
    transfer_token_s: float

    @classmethod
    def parse(cls, text: str) -> "MockTimes":
        """Read times written like `DEFAULT_TIMES`, which has those that are left out. No base, or nothing more, is 0.

        Raises:
            SettingsInvalid: they are not of that form.
        """
        values = _read_times(DEFAULT_TIMES) | _read_times(text)
        return cls(*values["prefill"], *values["step"], *values["transfer"])

    def step_s(self, plan: StepPlan) -> float:
        """How long a step takes."""
        seconds = 0.0
        if plan.decodes:
            seconds += self.step_base_s + self.step_row_s * len(plan.decodes)
        if plan.prefills:
            num_tokens = sum(chunk.num_tokens for chunk in plan.prefills)
            seconds += self.prefill_base_s + self.prefill_token_s * num_tokens
        return seconds

    def transfer_s(self, num_tokens: int) -> float:
        """How long the KV of so many tokens is on its way; none takes no time."""
        return self.transfer_base_s + self.transfer_token_s * num_tokens if num_tokens else 0.0


def _read_times(text: str) -> dict[str, tuple[float, float]]:
    """(base, for each) by name, in seconds."""
    values: dict[str, tuple[float, float]] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, sum_of_terms = part.partition("=")
        terms = [_TERM.fullmatch(term) for term in sum_of_terms.split("+")]
        seconds = {found[3]: float(found[1]) / _PER_SECOND[found[2]] for found in terms if found}
        per = _PER.get(name)
        if per is None or name in values or len(seconds) < len(terms) or not seconds.keys() <= {None, per}:
            raise SettingsInvalid(
                f"PDSERVE_MOCK_TIMES={text!r} cannot be used at {part!r}: write it like {DEFAULT_TIMES}"
            )
        values[name] = (seconds.get(None, 0.0), seconds.get(per, 0.0))
    return values


@dataclass(frozen=True, slots=True)
class MockModel:
    """Stands where `LoadedModel` does: a model of which nothing but its vocabulary and context is real."""

    name: str
    layout: KVLayout
    fingerprint: str
    vocab_size: int
    max_position_embeddings: int
    times: MockTimes
    weight_bytes: int = 0
    num_parameters: int = 0
    library: None = None

    @classmethod
    def of(
        cls, name: str, *, vocab_size: int, max_position_embeddings: int, block_size: int, times: MockTimes
    ) -> "MockModel":
        """A model with 8 bytes of KV per token. Equals have equal fingerprints, wherever and however fast they are."""
        layer = LayerLayout(num_kv_heads=1, key_dim=1, value_dim=1)
        layout = KVLayout(dtype="float32", block_size=block_size, layers=(layer,))
        facts = f"{Path(name).name} {vocab_size} {max_position_embeddings} {layout.model_dump_json()}"
        fingerprint = f"mock-{xxh3_128_hexdigest(facts.encode())}"
        return cls(name, layout, fingerprint, vocab_size, max_position_embeddings, times)


def mock_model(times: str, block_size: int, *, name: str) -> MockModel:
    """The mock of a model whose tokenizer and configuration are there; its weights need not be.

    Args:
        times: how long things take (`MockTimes.parse`).
        block_size: tokens in a block of KV.
        name: a hub id or folder; of the latter only the last part goes into the fingerprint.

    Raises:
        ModelRefused: tokenizer or configuration are not there, or malformed.
        SettingsInvalid: the times are malformed.
    """
    parsed = MockTimes.parse(times)
    config = ModelConfig.read(resolve_model(name))
    return MockModel.of(
        name,
        vocab_size=config.vocab_size or Tokenizer.load(name).vocab_size,
        max_position_embeddings=config.max_model_len,
        block_size=block_size,
        times=parsed,
    )


def mock_num_blocks(layout: KVLayout, kv_pool_bytes: int) -> int:
    """How many blocks a pool of that size has: not more than an accelerator's, as these are so small."""
    return min(kv_pool_bytes // layout.block_bytes, MAX_POOL_TOKENS // layout.block_size)


class WrongKV(Exception):
    """A block does not hold the KV that it should."""


class MockEngine(AnyEngine):
    """The engine that computes nothing.

    Args:
        loaded, pool, max_step_tokens: as `AnyEngine`'s; the pool is on the CPU.
        sleep: lets seconds pass.
    """

    loaded: MockModel

    def __init__(
        self,
        loaded: MockModel,
        pool: KVPool,
        max_step_tokens: int,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(loaded, pool, max_step_tokens)
        self._sleep = sleep
        self._kv = MockKV(pool)
        self._known: dict[str, _Known] = {}

    def add(self, sequence: EngineSequence) -> None:
        super().add(sequence)
        self._known[sequence.request_id] = _Known()

    def remove(self, request_id: str) -> bool:
        self._known.pop(request_id, None)
        return super().remove(request_id)

    def _compute(self, plan: StepPlan) -> list[tuple[EngineSequence, Choice]]:
        computed = parts(plan)
        for sequence, num_tokens in computed:
            self._read(sequence)
            self._write(sequence, num_tokens)
        self._sleep(self.loaded.times.step_s(plan))
        return [(one, self._choice(one)) for one, num_tokens in computed if num_tokens == one.num_uncomputed_tokens]

    def _read(self, sequence: EngineSequence) -> None:
        """Check KV: all that is new here, whoever computed it; else that of the last token and of one before it.

        Raises:
            WrongKV: it is not that of this sequence's tokens.
        """
        known = self._known[sequence.request_id]
        first, last = known.num_tokens, sequence.num_computed_tokens
        if first < last:
            token_ids = array("I", sequence.token_ids[first:last])
            self._kv.check(sequence, first, token_ids, known.take(token_ids))
        elif last:
            self._kv.check_token(sequence, last - 1, known.digest)
            # The digest is as good as random, so that over many steps the whole text has its turn.
            self._kv.check_token(sequence, known.digest % last)

    def _write(self, sequence: EngineSequence, num_tokens: int) -> None:
        first = sequence.num_computed_tokens
        token_ids = array("I", sequence.token_ids[first : first + num_tokens])
        self._kv.write(sequence.blocks, first, token_ids, self._known[sequence.request_id].take(token_ids))

    def _choice(self, sequence: EngineSequence) -> Choice:
        digest = self._known[sequence.request_id].digest
        token_id = draw(sequence.sampling, len(sequence.token_ids), digest, self.loaded.vocab_size)
        num_top = sequence.sampling.logprobs
        if num_top is None:
            return Choice(token_id, None, [])
        top = [((token_id + rank) % self.loaded.vocab_size, LEAST_LOGPROB if rank else 0.0) for rank in range(num_top)]
        return Choice(token_id, 0.0, top)


class MockKV:
    """The KV of tokens in a pool: words of 32 bits, of each block first the tokens' ids, then their digests."""

    def __init__(self, pool: KVPool) -> None:
        assert pool.layout.block_bytes == 8 * pool.layout.block_size, "two words for a token"
        self._words = host_bytes(pool.data).cast("I")
        self._block_size = pool.layout.block_size

    def write(self, blocks: Sequence[int], first: int, token_ids: "array[int]", digests: "array[int]") -> None:
        """Write the KV of the tokens at positions `first` and up."""
        for at, start, stop in self._places(blocks, first, len(token_ids)):
            for words, offset in ((token_ids, 0), (digests, self._block_size)):
                self._words[at + offset : at + offset + stop - start] = words[start:stop]

    def check(self, sequence: EngineSequence, first: int, token_ids: "array[int]", digests: "array[int]") -> None:
        """Raises `WrongKV` where the KV at positions `first` and up is not this."""
        for at, start, stop in self._places(sequence.blocks, first, len(token_ids)):
            for what, words, offset in (("token", token_ids, 0), ("digest", digests, self._block_size)):
                there, wanted = self._words[at + offset : at + offset + stop - start], words[start:stop]
                if there != wanted:
                    wrong = next(index for index, word in enumerate(wanted) if there[index] != word)
                    self._refuse(sequence, first + start + wrong, what, there[wrong], wanted[wrong])

    def check_token(self, sequence: EngineSequence, position: int, digest: int | None = None) -> None:
        """Raises `WrongKV` where the KV at a position is that of another token or, if given, has another digest."""
        at = self._place(sequence.blocks, position)
        token_id = sequence.token_ids[position]
        if self._words[at] != token_id:
            self._refuse(sequence, position, "token", self._words[at], token_id)
        if digest is not None and self._words[at + self._block_size] != digest:
            self._refuse(sequence, position, "digest", self._words[at + self._block_size], digest)

    def _place(self, blocks: Sequence[int], position: int) -> int:
        """Index of the first word of a position."""
        block, offset = divmod(position, self._block_size)
        return 2 * self._block_size * blocks[block] + offset

    def _places(self, blocks: Sequence[int], first: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Which of the tokens from position `first` on lie side by side: (first word of the first, start, stop)."""
        start = 0
        while start < num_tokens:
            stop = min(num_tokens, start + self._block_size - (first + start) % self._block_size)
            yield self._place(blocks, first + start), start, stop
            start = stop

    def _refuse(self, sequence: EngineSequence, position: int, what: str, there: int, wanted: int) -> None:
        block = sequence.blocks[position // self._block_size]
        raise WrongKV(
            f"mock engine: the KV of {sequence.request_id} is wrong at position {position} of "
            f"{sequence.num_computed_tokens}, in block {block}: {what} {there} instead of {wanted}"
        )


@dataclass(slots=True)
class _Known:
    """How many leading tokens of a sequence have been looked at, and their digest."""

    num_tokens: int = 0
    digest: int = _NO_TOKENS

    def take(self, token_ids: "array[int]") -> "array[int]":
        """Go on by these tokens; the digest up to each of them."""
        found = digests(token_ids, self.digest)
        self.num_tokens += len(found)
        self.digest = found[-1]
        return found


def digests(token_ids: Iterable[int], digest: int = _NO_TOKENS) -> "array[int]":
    """For each token a digest, of 32 bits, of all tokens up to it; `digest` is that of those before."""
    every = accumulate(token_ids, lambda before, token: (before * _MULTIPLIER + token + 1) & _WORD, initial=digest)
    return array("I", islice(every, 1, None))


def draw(sampling: SamplingParams, position: int, digest: int, vocab_size: int) -> int:
    """The token at a position, behind tokens of that digest; no stop token, unless there are no others."""
    seed = sampling.seed if sampling.temperature >= GREEDY_BELOW else 0
    token_id = xxh3_64_intdigest(struct.pack("<QII", seed, position, digest)) % vocab_size
    for _ in sampling.stop_token_ids:
        if token_id not in sampling.stop_token_ids:
            break
        token_id = (token_id + 1) % vocab_size
    return token_id


@dataclass(frozen=True, slots=True)
class MockParcel(Parcel):
    """Bytes that take so many seconds to get ready for the socket, on top of what they really take."""

    seconds: float = 0.0

    async def settle(self) -> None:
        await asyncio.sleep(self.seconds)


class MockStaging(InPlace):
    """The way from a pool on the CPU to sockets, as slow as that of real KV. The slots of both sides wait for it."""

    def __init__(self, pool: KVPool, times: MockTimes) -> None:
        super().__init__(pool)
        self._token_bytes = pool.layout.block_bytes // pool.layout.block_size
        self._times = times

    def export(self, blocks: Sequence[int], num_bytes: int) -> Parcel:
        views = super().export(blocks, num_bytes).views
        return MockParcel(views, seconds=self._times.transfer_s(num_bytes // self._token_bytes))
