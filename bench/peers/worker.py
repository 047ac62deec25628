"""What every worker shares: JSON lines on stdin and stdout, the prompts, and the clock.

A worker runs in its engine's own Python environment, so this file needs nothing but the standard library. Engines are
imported when they are loaded, and not before: their environment variables have to be set by then.
"""

import ctypes
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

Precision = Literal["float32", "bfloat16", "int8"]
"""Of weights, computation and KV; `int8` is linears with 8-bit weights, and all else in bfloat16."""

PR_SET_PDEATHSIG = 1

OnStep = Callable[[Iterable[tuple[int, int]]], bool]
"""Takes the tokens of a step as (number of the request, token id); True once there are enough and the run may end."""


@dataclass(frozen=True)
class Load:
    """What an engine is to be ready for.

    Args:
        model: folder with config.json and safetensors.
        converted: folder for files that the engine's own format needs, made by `prepare`.
        max_requests: at once.
        max_length: tokens of the longest request, prompt and answer.
        kv_tokens: tokens that the requests of one run have together.
        kv_bytes: what the KV of so many tokens takes.
        step_tokens: how many tokens a step computes at most, in engines that mix prefill and decode.
    """

    model: str
    converted: str
    precision: Precision
    threads: int
    max_requests: int
    max_length: int
    kv_tokens: int
    kv_bytes: int
    step_tokens: int


class Peer(Protocol):
    """An engine that is loaded."""

    version: str

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        """Generate greedily for all prompts together, end-of-text tokens or not, until `on_step` returns True.

        On return the engine has nothing left to do.

        Args:
            room: the most tokens any request may get; `on_step` ends the run before that.
        """


class Meter:
    """The clock of one run, and the tokens it gave.

    Engines that mix prefill and decode give the first requests more tokens while the last ones are still in prefill.
    So that decode is measured with all requests in every step, it is timed from the step in which the last request got
    its first token, for as many tokens as `num_tokens - 1` steps of all requests give.

    Args:
        patience_s: a run that has not come to its end by then is given up.
    """

    def __init__(self, num_requests: int, num_tokens: int, patience_s: float) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_requests)]
        self._to_decode = num_requests * (num_tokens - 1)
        self._num_decoded = 0
        self._num_waiting = num_requests
        self._patience_s = patience_s
        self._given_up = False
        self._start = self._first = self._end = now()

    def __call__(self, step: Iterable[tuple[int, int]]) -> bool:
        all_decode = self._num_waiting == 0
        for request, token_id in step:
            if not self.tokens[request]:
                self._num_waiting -= 1
            self.tokens[request].append(token_id)
            self._num_decoded += all_decode
        if not all_decode and self._num_waiting == 0:
            self._first = now()
        if all_decode and self._num_decoded >= self._to_decode and self._end == self._start:
            self._end = now()
        enough = self._num_decoded >= self._to_decode
        self._given_up = not enough and now()[0] - self._start[0] > self._patience_s
        return enough or self._given_up

    def result(self) -> dict[str, float]:
        """Milliseconds to the first token of all, and decoded tokens per second, by wall clock and by CPU time.

        Empty if the run was given up.
        """
        if self._given_up:
            return {}
        if self._end == self._start:
            raise RuntimeError(f"{self._num_decoded} of {self._to_decode} tokens came")
        prefill, decode = (
            [later - earlier for later, earlier in zip(ends, starts, strict=True)]
            for ends, starts in ((self._first, self._start), (self._end, self._first))
        )
        return {
            "prefill_ms": prefill[0] * 1000,
            "prefill_cpu_ms": prefill[1] * 1000,
            "decode_tok_s": self._num_decoded / decode[0],
            "decode_tok_cpu_s": self._num_decoded / decode[1],
            "busy": (prefill[1] + decode[1]) / (prefill[0] + decode[0]),
        }


def now() -> tuple[float, float]:
    """Seconds of wall clock, and of CPU time of this process."""
    return time.perf_counter(), time.process_time()


def room(num_requests: int, context: int, num_tokens: int, step_tokens: int) -> int:
    """The most tokens a request may get until the last has `num_tokens`: one in each step of prefill, and some."""
    return num_tokens + math.ceil(num_requests * context / (step_tokens - num_requests)) + 8


def serve(load: Callable[[Load], Peer]) -> None:
    """Be a worker: load what the first line asks for, then run what the others ask for, until there are no more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a driver that is killed leaves no stopped workers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print what they like
    try:
        _answer_all((json.loads(line) for line in sys.stdin), answers, load)
    except Exception:  # noqa: BLE001 - the process ends, whatever threads the engine has
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _answer_all(lines: Iterator[dict[str, Any]], answers: TextIO, load: Callable[[Load], Peer]) -> None:
    asked = Load(**next(lines))
    peer = load(asked)
    answers.write(json.dumps({"version": peer.version, **_memory_mb()}) + "\n")
    vocab_size = json.loads((Path(asked.model) / "config.json").read_text())["vocab_size"]
    for line in lines:
        answers.write(json.dumps(_run(peer, asked, vocab_size, **line)) + "\n")


def _run(
    peer: Peer,
    asked: Load,
    vocab_size: int,
    *,
    seed: str,
    num_requests: int,
    context: int,
    num_tokens: int,
    patience_s: float,
) -> dict[str, Any]:
    """The same seed gives every engine the same prompts."""
    random_ids = random.Random(seed)
    prompts = [[random_ids.randrange(3, vocab_size) for _ in range(context)] for _ in range(num_requests)]
    meter = Meter(num_requests, num_tokens, patience_s)
    peer.run(prompts, room(num_requests, context, num_tokens, asked.step_tokens), meter)
    tokens = [ids[:num_tokens] for ids in meter.tokens]
    return {**meter.result(), "tokens": tokens, **_memory_mb()}


def _memory_mb() -> dict[str, float]:
    """Resident memory of this process, now and at its highest."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}
