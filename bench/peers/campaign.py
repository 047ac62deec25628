"""Which runs there are, in which order: rounds, in a round points, at a point the engines one after another."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.catalog import OURS, Engine, environment
from bench.peers.floor import Floor, floor_of
from bench.peers.model import kv_bytes_per_token
from bench.peers.process import ROOT, PeerFailed, Worker, last_line
from bench.peers.worker import Load, Precision, room

WARM_UP_TOKENS = 4
AGREEMENT = {"seed": "agreement", "num_requests": 4, "context": 64, "num_tokens": 16, "patience_s": 600}


@dataclass(frozen=True, order=True)
class Point:
    """So many requests, each with a prompt of `context` tokens."""

    num_requests: int
    context: int


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        points: for every engine.
        scaling: for ours besides.
        rounds: timed ones; one of a few tokens comes before them and is not reported.
        num_tokens: tokens that each request gets, the first included.
        patience_s: a run of so long is given up, and its engine left out at that point.
        pythons: interpreter of each engine, by its name.
        folder: for conversions and logs.
    """

    model: str
    points: Sequence[Point]
    scaling: Sequence[Point]
    rounds: int
    num_tokens: int
    patience_s: float
    threads: int
    step_tokens: int
    pythons: Mapping[str, str]
    folder: Path


@dataclass
class Outcome:
    """What came of one precision: facts about each engine by its name, timed runs, and why engines are missing."""

    precision: Precision
    floor: Floor | None = None
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    too_slow: set[tuple[str, int, int]] = field(default_factory=set)
    """Engine, requests and context of what took longer than `patience_s`."""


def campaign(plan: Plan, engines: Sequence[Engine], precision: Precision) -> Outcome:
    """Load the engines, let them take turns, end them."""
    _say(f"{precision}: measuring what the machine can do")
    variables = environment(sys.executable, plan.threads)
    outcome = Outcome(precision, floor_of(plan.model, precision, plan.threads, variables))
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in engines:
            try:
                workers[engine.name] = stack.enter_context(_start(plan, engine, precision))
            except (PeerFailed, OSError) as failed:
                outcome.left_out[engine.name] = str(failed)
        _compare_tokens(workers, outcome)
        for number in range(plan.rounds + 1):
            for point in plan.points:
                _turn(plan, workers, outcome, point, number)
            for point in plan.scaling:
                _turn(plan, workers, outcome, point, number, scaling=True)
        for name, worker in workers.items():
            outcome.engines[name] |= {"load_s": worker.load_s, **worker.loaded, "peak_mb": worker.peak_mb}
    return outcome


def _start(plan: Plan, engine: Engine, precision: Precision) -> Worker:
    python = plan.pythons[engine.name]
    variables = environment(python, plan.threads)
    log = plan.folder / f"{engine.module.split('.')[-1]}-{precision}.log"
    if engine.converts:
        command = [python, "-m", engine.module, plan.model, str(plan.folder), precision]
        _say(f"{precision}: converting the model for {engine.name}")
        with log.open("w") as output:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
        if done.returncode:
            raise PeerFailed(last_line(log))
    _say(f"{precision}: loading {engine.name}")
    return Worker([python, "-m", engine.module], variables, _load(plan, engine, precision), log)


def _load(plan: Plan, engine: Engine, precision: Precision) -> Load:
    points = [*plan.points, Point(AGREEMENT["num_requests"], AGREEMENT["context"])]
    if engine is OURS:
        points += plan.scaling
    lengths = {point: _length(plan, point) for point in points}
    kv_tokens = max(point.num_requests * length for point, length in lengths.items())
    return Load(
        model=plan.model,
        converted=str(plan.folder),
        precision=precision,
        threads=plan.threads,
        max_requests=max(point.num_requests for point in points),
        max_length=max(lengths.values()),
        kv_tokens=kv_tokens,
        kv_bytes=kv_tokens * kv_bytes_per_token(plan.model, 4 if precision == "float32" else 2),
        step_tokens=plan.step_tokens,
    )


def _length(plan: Plan, point: Point) -> int:
    num_tokens = max(plan.num_tokens, AGREEMENT["num_tokens"])
    return point.context + room(point.num_requests, point.context, num_tokens, plan.step_tokens)


def _compare_tokens(workers: dict[str, Worker], outcome: Outcome) -> None:
    """The first question to every engine: which tokens come, and how many are those of ours until the first other."""
    expected: list[list[int]] | None = None
    for name in list(workers):
        answer = _ask(workers, outcome, name, AGREEMENT)
        if answer is None:
            continue
        expected = expected or answer["tokens"]
        same = [_num_same(own, theirs) for own, theirs in zip(expected, answer["tokens"], strict=True)]
        outcome.engines[name] = {"same_tokens": sum(same) / sum(map(len, expected))}


def _num_same(ours: list[int], theirs: list[int]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return next((index for index, (own, other) in enumerate(pairs) if own != other), len(ours))


def _turn(
    plan: Plan, workers: dict[str, Worker], outcome: Outcome, point: Point, number: int, *, scaling: bool = False
) -> None:
    """Every engine, or ours alone for scaling, computes the same prompts at one point; round 0 warms up."""
    question = {
        "seed": f"{number} {point}",
        "num_requests": point.num_requests,
        "context": point.context,
        "num_tokens": plan.num_tokens if number else WARM_UP_TOKENS,
        "patience_s": plan.patience_s,
    }
    for name in [name for name in workers if name == OURS.name or not scaling]:
        slow = (name, point.num_requests, point.context)
        answer = None if slow in outcome.too_slow else _ask(workers, outcome, name, question)
        if answer is None:
            continue
        if "prefill_ms" not in answer:
            outcome.too_slow.add(slow)
            continue
        _say(
            f"{outcome.precision} round {number}, {point.num_requests} x {point.context}, {name}: "
            f"{answer['prefill_ms']:.0f} ms, {answer['decode_tok_s']:.0f} tok/s"
        )
        if not number:
            continue
        where = {"engine": name, "round": number, "requests": point.num_requests, "context": point.context}
        figures = {key: value for key, value in answer.items() if key not in ("tokens", "rss_mb", "peak_mb")}
        figures["tokens"] = plan.num_tokens
        outcome.runs.append({**where, "scaling": scaling, **figures})


def _ask(workers: dict[str, Worker], outcome: Outcome, name: str, question: Mapping[str, Any]) -> dict[str, Any] | None:
    """None if it ended; it is left out from there on."""
    try:
        return workers[name].ask(question)
    except PeerFailed as failed:
        outcome.left_out[name] = str(failed)
        outcome.runs = [run for run in outcome.runs if run["engine"] != name]
        outcome.engines.pop(name, None)
        del workers[name]
        return None


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
