"""What the prefix cache saves: prefill of 8 requests with 512 tokens in common, with it and without.

    .venv/bin/python -m bench.prefix [--model FOLDER] [--rounds 5] [--own 16]

Two ways: all requests at once, of which one computes the common tokens and the others follow; and one after another, of
which the first leaves them behind. In each round the two engines, with cache and without, take turns with the same new
prompts. Reported are medians of the time until every request has its first token, and their ratio; the bound is 4.
Without `--model` it makes a Llama of 100 million parameters with random weights.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.model import make_model
from bench.running import machine
from shared.engine.engine import Engine
from shared.engine.loading.loader import load_model
from shared.engine.model import LoadedModel
from shared.engine.pool import KVPool
from shared.engine.prefix_cache import Allocation, PrefixCache
from shared.engine.sequence import Sequence as EngineSequence
from shared.sampling import SamplingParams
from shared.settings import tame_threads

NUM_REQUESTS = 8
NUM_SHARED = 512
BOUND = 4.0
BLOCK_SIZE = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)

Prompts = Sequence[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a model; one of its own unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own", type=int, default=16, help="tokens that each request has for itself")
    parser.add_argument("--threads", type=int, help="torch threads; all cores unless given")
    arguments = parser.parse_args()
    tame_threads()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model = arguments.model or make_model(Path(folder))
        loaded = load_model(model, dtype="float32", block_size=BLOCK_SIZE, num_threads=arguments.threads)
    print(f"{machine()}\n{loaded.num_parameters / 1e6:.0f} million parameters, fp32; {arguments.rounds} rounds")
    print(f"{NUM_REQUESTS} requests of {NUM_SHARED} common and {arguments.own} own tokens, ms until all have a token")
    print(f"{'':>18} {'without':>10} {'with cache':>10} {'ratio':>6}  at least {BOUND:g}")
    instances = {enabled: Instance(loaded, arguments.own) for enabled in (False, True)}
    for name, way in (("all at once", Instance.at_once), ("one after another", Instance.one_after_another)):
        _report(name, measure(instances, way, arguments.rounds, arguments.own, loaded.vocab_size))


class Instance:
    """An engine with blocks for all requests, as a prefill instance has it."""

    def __init__(self, loaded: LoadedModel, num_own: int) -> None:
        num_blocks = NUM_REQUESTS * loaded.layout.num_blocks(NUM_SHARED + num_own)
        self.engine = Engine(loaded, KVPool(loaded.layout, num_blocks), max_step_tokens=512)

    def at_once(self, prompts: Prompts, cache: PrefixCache) -> None:
        held = [self._add(str(number), prompt, cache) for number, prompt in enumerate(prompts)]
        self._run(held, cache)

    def one_after_another(self, prompts: Prompts, cache: PrefixCache) -> None:
        for prompt in prompts:
            self._run([self._add("one", prompt, cache)], cache)

    def _add(self, request_id: str, prompt: list[int], cache: PrefixCache) -> tuple[EngineSequence, Allocation]:
        allocation = cache.take(cache.match(prompt, pending=True), self.engine.pool.layout.num_blocks(len(prompt)))
        assert allocation is not None, "there are blocks for all"
        cache.name(allocation, prompt)
        blocks, num_shared = list(allocation.blocks), allocation.num_matched
        sequence = EngineSequence(
            request_id, list(prompt), len(prompt), blocks, GREEDY, num_to_generate=1, num_shared_blocks=num_shared
        )
        self.engine.add(sequence)
        return sequence, allocation

    def _run(self, held: Sequence[tuple[EngineSequence, Allocation]], cache: PrefixCache) -> None:
        while self.engine.has_work:
            self.engine.step()
        for sequence, allocation in held:
            cache.release(allocation, sequence.token_ids[: sequence.num_computed_tokens])


def measure(
    instances: dict[bool, Instance],
    way: Callable[[Instance, Prompts, PrefixCache], None],
    num_rounds: int,
    num_own: int,
    vocab_size: int,
) -> dict[bool, list[float]]:
    """Milliseconds of each round, without the cache and with it."""
    taken: dict[bool, list[float]] = {enabled: [] for enabled in instances}
    for number in range(num_rounds + 1):
        dice = random.Random(f"{way.__name__} {number}")
        common = [dice.randrange(vocab_size) for _ in range(NUM_SHARED)]
        prompts = [common + [dice.randrange(vocab_size) for _ in range(num_own)] for _ in range(NUM_REQUESTS)]
        for enabled, instance in instances.items():
            cache = PrefixCache(instance.engine.pool.num_blocks, BLOCK_SIZE, enabled=enabled)
            started_at = time.perf_counter()
            way(instance, prompts, cache)
            if number > 0:  # the first warms up
                taken[enabled].append((time.perf_counter() - started_at) * 1000)
    return taken


def _report(name: str, taken: dict[bool, list[float]]) -> None:
    without, with_cache = (statistics.median(taken[enabled]) for enabled in (False, True))
    ratio = without / with_cache
    print(f"{name:>18} {without:>10.0f} {with_cache:>10.0f} {ratio:>6.1f}  {'yes' if ratio >= BOUND else 'NO'}")


if __name__ == "__main__":
    main()
