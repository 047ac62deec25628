"""What was measured, as Markdown."""

from collections.abc import Callable
from operator import itemgetter
from statistics import median
from typing import Any, Literal

from bench.peers.campaign import Outcome, Point
from bench.peers.catalog import OURS
from bench.peers.floor import Floor

Clock = Literal["wall", "cpu"]
KEYS = {"wall": ("prefill_ms", "decode_tok_s"), "cpu": ("prefill_cpu_ms", "decode_tok_cpu_s")}
TOO_SLOW = "too slow"
ALONE = 0.95
"""Of a core that is the worker's alone it has at least this part."""


Figure = Callable[[dict[str, Any]], float]
"""What a run says."""


def medians(outcome: Outcome, figure: Figure, *, scaling: bool = False) -> dict[Point, dict[str, float]]:
    """The median over rounds, by point and engine."""
    found: dict[Point, dict[str, list[float]]] = {}
    for run in outcome.runs:
        if run["scaling"] == scaling:
            point = Point(run["requests"], run["context"])
            found.setdefault(point, {}).setdefault(run["engine"], []).append(figure(run))
    return {
        point: {name: median(values) for name, values in engines.items()} for point, engines in sorted(found.items())
    }


def markdown(outcome: Outcome, clock: Clock) -> str:
    """All tables of one precision."""
    prefill, decode = KEYS[clock]
    parts = [
        f"## {outcome.precision}",
        _speeds(outcome, itemgetter(prefill), "Prefill: ms to the first token of all", Floor.prefill_ms, _time_ratio),
        _speeds(outcome, itemgetter(decode), "Decode: tokens per second", Floor.decode_tok_s, _speed_ratio),
        _whole(outcome, prefill, decode),
        _scaling(outcome, itemgetter(decode)),
        _facts(outcome),
        _left_out(outcome),
        _warning(outcome),
    ]
    return "\n\n".join(part for part in parts if part)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time_ratio(ours: float, theirs: float) -> float:
    return theirs / ours


def _speed_ratio(ours: float, theirs: float) -> float:
    return ours / theirs


def _speeds(
    outcome: Outcome,
    figure: Figure,
    title: str,
    floor: Callable[[Floor, int, int], float],
    ratio: Callable[[float, float], float],
) -> str:
    found = medians(outcome, figure)
    names = list(outcome.engines)
    rows = []
    for point, values in found.items():
        cells = []
        for name in names:
            ours, theirs = values.get(OURS.name), values.get(name)
            beside = f" ({ratio(ours, theirs):.2f}x)" if ours and theirs and name != OURS.name else ""
            cells.append(f"{theirs:.0f}{beside}" if theirs else TOO_SLOW)
        if outcome.floor:
            bound = floor(outcome.floor, point.num_requests, point.context)
            cells.append(
                f"{bound:.0f} ({ratio(values[OURS.name], bound):.0%})" if OURS.name in values else f"{bound:.0f}"
            )
        rows.append([str(point.num_requests), str(point.context), *cells])
    text = f"{title}; in brackets, our speed as a multiple of theirs, and as a part of what the machine can do.\n\n"
    return text + table(["requests", "context", *names, *(["machine"] if outcome.floor else [])], rows)


def _whole(outcome: Outcome, prefill: str, decode: str) -> str:
    """Prefill and decode together, also for engines whose tokens come in bursts, which tell neither from the other."""
    num_tokens = {run["tokens"] for run in outcome.runs}
    if len(num_tokens) != 1:
        return ""
    steps = num_tokens.pop() - 1

    def of_run(run: dict[str, Any]) -> float:
        milliseconds: float = run[prefill] + 1000.0 * run["requests"] * steps / run[decode]
        return milliseconds

    def of_machine(floor: Floor, num_requests: int, context: int) -> float:
        decode_s = num_requests * steps / floor.decode_tok_s(num_requests, context)
        return floor.prefill_ms(num_requests, context) + 1000.0 * decode_s

    title = f"Whole requests: ms until all have {steps + 1} tokens"
    return _speeds(outcome, of_run, title, of_machine, _time_ratio)


def _scaling(outcome: Outcome, figure: Figure) -> str:
    found = medians(outcome, figure, scaling=True)
    if not found:
        return ""
    values = {point: engines[OURS.name] for point, engines in found.items()}
    first = next(iter(values.values()))
    rows = [[str(point.num_requests), f"{value:.0f}", f"{value / first:.1f}x"] for point, value in values.items()]
    context = next(iter(values)).context
    text = f"Decode of {OURS.name} by the number of requests, at a context of {context} tokens.\n\n"
    return text + table(["requests", "tokens per second", "of one request's"], rows)


def _facts(outcome: Outcome) -> str:
    def row(name: str, facts: dict[str, Any]) -> list[str]:
        numbers = [f"{facts[key]:.0f}" for key in ("load_s", "rss_mb", "peak_mb")]
        return [name, facts["version"].split("-")[0], *numbers, f"{facts['same_tokens']:.0%}"]

    header = ["engine", "version", "load s", "MB after load", "MB at most", "same tokens as the first"]
    return table(header, [row(name, facts) for name, facts in outcome.engines.items()])


def _left_out(outcome: Outcome) -> str:
    reasons = [f"{name} ({reason})" for name, reason in sorted(outcome.left_out.items())]
    return f"Left out: {', '.join(reasons)}." if reasons else ""


def _warning(outcome: Outcome) -> str:
    """Whether somebody else computed on the same core."""
    least = min((run["busy"] for run in outcome.runs), default=1.0)
    if least >= ALONE:
        return ""
    return (
        f"**Not alone on the core**: in some run a worker had it for {least:.0%} of the time. "
        "Wall-clock figures mean little then; `--clock cpu` counts CPU time instead."
    )
