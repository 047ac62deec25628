"""What serving adds to the time to first token: over HTTP, against the engine alone, on the same prompts in one run.

    .venv/bin/python -m bench.ttft [--model FOLDER] [--rounds 30]

One request at a time. For each prompt length the two take turns: the engine in this process computes the prompt (a step
or more, with sampling of the first token), then the same prompt goes to a running pdserve as a streaming completion,
and the clock stops at the first event with a token. Both use one thread. Reported are medians, and the median and the
95th percentile of the difference; the bound of 15 ms is on the median difference.
"""

import argparse
import json
import random
import statistics
import time

import httpx

from bench.running import machine, pdserve_up
from shared.engine.engine import Engine
from shared.engine.loading.loader import load_model
from shared.engine.pool import KVPool
from shared.engine.sequence import Sequence
from shared.sampling import SamplingParams
from shared.settings import DEMO_MODEL, tame_threads

LENGTHS = [16, 128, 512, 1024, 2000]
BOUND_MS = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    tame_threads()
    engine = _engine(arguments.model)
    print(machine())
    print(f"{arguments.rounds} rounds, one request at a time, one thread each, fp32")
    print(f"{'prompt':>8} {'engine ms':>10} {'HTTP ms':>10} {'added ms':>10} {'added p95':>10}  within {BOUND_MS:g} ms")
    with pdserve_up("--model", arguments.model, "--threads", "1") as running, httpx.Client(trust_env=False) as client:
        name = client.get(f"{running.url}/v1/models").json()["data"][0]["id"]
        for length in LENGTHS:
            engine_ms, http_ms = [], []
            for number in range(arguments.rounds + 2):
                prompt = [random.Random(f"{length} {number}").randrange(10, 4000) for _ in range(length)]
                alone, served = prefill_ms(engine, prompt), ttft_ms(client, running.url, name, prompt)
                if number >= 2:  # the first two warm caches up
                    engine_ms.append(alone)
                    http_ms.append(served)
            _report(length, engine_ms, http_ms)


def prefill_ms(engine: Engine, prompt: list[int]) -> float:
    """The engine's own time from a prompt to its first token."""
    blocks = list(range(engine.pool.layout.num_blocks(len(prompt))))
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    engine.add(Sequence("one", list(prompt), len(prompt), blocks, sampling, num_to_generate=1))
    started_at = time.perf_counter()
    while not engine.step():
        pass
    return (time.perf_counter() - started_at) * 1000


def ttft_ms(client: httpx.Client, url: str, model: str, prompt: list[int]) -> float:
    """From sending the request to the first event that carries a token."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    first = 0.0
    started_at = time.perf_counter()
    with client.stream("POST", f"{url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60) as response:
        for line in response.iter_lines():
            if not first and line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("token_ids"):
                first = time.perf_counter()
    assert first, "the answer had no token"
    return (first - started_at) * 1000


def _engine(model: str) -> Engine:
    loaded = load_model(model, dtype="float32", num_threads=1)
    pool = KVPool(loaded.layout, loaded.layout.num_blocks(max(LENGTHS)) + 1)
    return Engine(loaded, pool, max_step_tokens=512)


def _report(length: int, engine_ms: list[float], http_ms: list[float]) -> None:
    added = sorted(served - alone for alone, served in zip(engine_ms, http_ms, strict=True))
    median, p95 = statistics.median(added), added[int(0.95 * (len(added) - 1))]
    columns = [statistics.median(engine_ms), statistics.median(http_ms), median, p95]
    print(
        f"{length:>8} "
        + " ".join(f"{value:>10.1f}" for value in columns)
        + f"  {'yes' if median <= BOUND_MS else 'NO'}"
    )


if __name__ == "__main__":
    main()
