"""Our engine beside others: same weights, same prompts, one thread each, taking turns on one core.

    .venv/bin/python -m bench.engine [--vllm PATH/bin/python] [--openvino PATH/bin/python] [--quick] [--scaling]

Peers live in Python environments of their own (README.md here says how to make them); one that is not given is left
out. Prefill is the time until all requests, given together, have their first token; decode is tokens per second from
then on, with all requests in every step, greedy, end-of-text tokens or not. Every engine has prefix caching off and a
worker process of its own, which is stopped while it is not its turn. Figures are medians over rounds.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

from bench.peers.campaign import Outcome, Plan, Point, campaign
from bench.peers.catalog import ENGINES, Engine
from bench.peers.chart import bar_chart
from bench.peers.model import make_model
from bench.peers.report import KEYS, markdown, medians
from bench.running import machine

REQUESTS = [1, 8, 32]
CONTEXTS = [128, 1024]
SCALING = [1, 2, 4, 8, 16, 32, 64]
PRECISIONS = ["float32", "bfloat16", "int8"]


def main() -> None:
    arguments = _arguments()
    words = [machine()]
    _pin(arguments.cores, arguments.threads)
    words.append(_settings(arguments))
    print("\n".join(words), flush=True)
    engines, left_out = _engines(arguments)
    outcomes = []
    with ExitStack() as stack:
        folder = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="pdserve-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        plan = _plan(arguments, folder)
        for precision in arguments.precisions:
            able = [engine for engine in engines if precision in engine.precisions]
            unable = {engine.name: f"it has no {precision} here" for engine in engines if engine not in able}
            outcome = campaign(plan, able, precision)
            outcome.left_out |= unable | left_out
            outcomes.append(outcome)
            print("\n" + markdown(outcome, arguments.clock), flush=True)
            _write_files(arguments, words, outcomes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in [engine.option for engine in ENGINES if engine.option]:
        parser.add_argument(f"--{option}", metavar="PYTHON", help="the interpreter of the environment that has it")
    parser.add_argument("--model", help="folder of the model; a random Llama of 100M parameters unless given")
    parser.add_argument("--keep", metavar="FOLDER", help="for conversions and logs; kept, one model each")
    names = [engine.name for engine in ENGINES]
    parser.add_argument("--without", nargs="+", default=[], choices=names, metavar="ENGINE", help=", ".join(names))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="prompt lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="that each request gets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round, 16 tokens, 1 and 4 requests, context 128")
    parser.add_argument("--scaling", action="store_true", help=f"ours at {SCALING} requests besides")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds after which a run is given up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", nargs="+", type=int, help="where all workers run; the last ones unless given")
    parser.add_argument("--step-tokens", type=int, default=512, help="the most a step computes, in every engine")
    parser.add_argument("--clock", choices=list(KEYS), default="wall", help="what tables show; files have both")
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument("--plot", metavar="FILE.svg")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens, arguments.requests, arguments.contexts = 1, 16, [1, 4], [128]
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: it goes with --threads 1")
    return arguments


def _plan(arguments: argparse.Namespace, folder: Path) -> Plan:
    model = arguments.model
    if model is None:
        made = folder / "model"
        model = str(made) if made.exists() else make_model(made)
    return Plan(
        model=str(Path(model).resolve()),
        points=[Point(requests, context) for requests in arguments.requests for context in arguments.contexts],
        scaling=[Point(requests, min(arguments.contexts)) for requests in SCALING] if arguments.scaling else [],
        rounds=arguments.rounds,
        num_tokens=arguments.tokens,
        patience_s=arguments.patience,
        threads=arguments.threads,
        step_tokens=arguments.step_tokens,
        pythons={engine.name: _python(arguments, engine) or sys.executable for engine in ENGINES},
        folder=folder.resolve(),
    )


def _engines(arguments: argparse.Namespace) -> tuple[list[Engine], dict[str, str]]:
    """Those to run, and why not the others."""
    left_out = {}
    for engine in ENGINES:
        if engine.name in arguments.without:
            left_out[engine.name] = "--without"
        elif engine.option and not _python(arguments, engine):
            left_out[engine.name] = f"no --{engine.option}"
    return [engine for engine in ENGINES if engine.name not in left_out], left_out


def _python(arguments: argparse.Namespace, engine: Engine) -> str | None:
    """The interpreter that was given for it."""
    given = getattr(arguments, engine.option.replace("-", "_")) if engine.option else None
    return given and os.path.abspath(given)  # not resolved: in an environment it is a link


def _pin(cores: list[int] | None, threads: int) -> None:
    """To these cores; workers inherit it."""
    os.sched_setaffinity(0, cores or sorted(os.sched_getaffinity(0))[-threads:])


def _settings(arguments: argparse.Namespace) -> str:
    """Those that figures depend on, in a line."""
    cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    return (
        f"model {arguments.model or 'random Llama, 100M parameters'}; threads {arguments.threads} on core {cores}; "
        f"{arguments.tokens} tokens per request; {arguments.step_tokens} tokens per step; rounds {arguments.rounds}; "
        f"clock {arguments.clock}"
    )


def _write_files(arguments: argparse.Namespace, words: list[str], outcomes: list[Outcome]) -> None:
    """After each precision, so that a campaign that is broken off leaves something."""
    if arguments.out:
        machine_used, settings = words
        results = {"machine": machine_used, "settings": settings, "outcomes": [asdict(one) for one in outcomes]}
        Path(arguments.out).write_text(json.dumps(results, indent=1, default=list) + "\n")
    if arguments.plot:
        Path(arguments.plot).write_text(_plot(outcomes, KEYS[arguments.clock][1]))


def _plot(outcomes: list[Outcome], key: str) -> str:
    panels = {}
    for outcome in outcomes:
        groups = {
            f"{point.num_requests} x {point.context}": values
            for point, values in medians(outcome, itemgetter(key)).items()
        }
        panels[f"{outcome.precision}: decode, tokens per second, by requests x context"] = groups
    return bar_chart(panels)


if __name__ == "__main__":
    main()
