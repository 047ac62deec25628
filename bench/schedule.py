"""Prefill under load without a system: a simulation of the two ways that `bench.forwarding` compares, and how many
first tokens any schedule could deliver in time.

    .venv/bin/python -m bench.schedule TRACE.csv [--half first|second|both] [--loads 1 2 4 5] [--ttft-ms 1000]

The simulation has what matters for the order of service: steps of at most 512 tokens that several prompts share,
admission one step ahead, slots that stay in use until KV has been fetched, questions that take 2 ms, several gateways,
and estimates that are wrong. The policy is the gateway's own (`services/gateway/routing.py`).

"Best in hindsight" and "at most" are explained in `bench/hindsight.py`.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf

from bench.hindsight import best_in_hindsight, upper_bound
from bench.load import Item, at_rate, read_trace
from services.gateway.routing import Waiting, is_hopeless, service_order

LONGEST = 2000
HALVES = {"first": (0.0, 0.5), "second": (0.5, 1.0)}


def half_of(items: Sequence[Item], half: str) -> list[Item]:
    """The named half of a trace, by number of requests, with times from its first request."""
    first, last = (round(share * len(items)) for share in HALVES[half])
    part = items[first:last]
    return [Item(one.at_s - part[0].at_s, one.num_prompt_tokens, one.num_output_tokens) for one in part]


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of an engine's prefill: of a step, for each token, and for each pair of tokens that attend."""

    step_s: float = 0.002
    token_s: float = 2.7e-4
    pair_s: float = 2.3e-7

    def of_chunk(self, num_before: int, num_tokens: int) -> float:
        """Of the next tokens of a prompt, without the step itself."""
        return self.token_s * num_tokens + self.pair_s * (num_tokens * num_before + num_tokens * (num_tokens + 1) // 2)

    def capacity(self, items: Sequence[Item], num_instances: int) -> float:
        """Prompts per second with all instances at work."""
        return num_instances * len(items) / sum(self.of_chunk(0, one.num_prompt_tokens) for one in items)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. `estimate_bias` and `estimate_noise` are shares by which all, or single, estimates err."""

    num_instances: int = 2
    num_gateways: int = 1
    slots: int = 4
    max_step_tokens: int = 512
    ttft_s: float = 1.0
    slack_share: float = 0.05
    """The share of the objective that the gateway leaves for the way of the first token."""
    client_s: float = 0.005
    """The way of a request to the gateway and of its first token back, in all."""
    message_s: float = 0.001
    """The way of one message between gateway and instance."""
    fetch_s: float = 0.015
    """From the first token until the KV has been fetched and the slot is free."""
    estimate_bias: float = 0.0
    estimate_noise: float = 0.0
    speed: Speed = Speed()


@dataclass(slots=True, eq=False)
class Prompt(Waiting):
    """One request. `first_token_at` stays infinite if it is shed."""

    num_tokens: int = 0
    num_computed: int = 0
    first_token_at: float = inf


@dataclass(slots=True, eq=False)
class Instance:
    """A prefill instance: prompts in their order, a step of some of them at a time."""

    number: int
    prompts: list[Prompt] = field(default_factory=list)
    slots_used: int = 0
    step_ends_at: float = 0.0
    in_step: dict[Prompt, int] = field(default_factory=dict)
    """Tokens of each prompt in the step that runs."""
    rejected: set[int] = field(default_factory=set)
    """Gateways that wait to hear of a free slot."""

    def num_uncomputed(self) -> int:
        """Tokens that the running step leaves."""
        return sum(one.num_tokens - one.num_computed - self.in_step.get(one, 0) for one in self.prompts)


@dataclass(slots=True)
class View:
    """What a gateway knows of an instance: until when it has work, and whether a question makes sense."""

    free_at: float = 0.0
    is_full: bool = False


Order = Callable[[list[Prompt], Sequence[float], float], list[Prompt]]
Hopeless = Callable[[Prompt, float], bool]


class Simulation:
    """One run of one way over a trace."""

    def __init__(self, setup: Setup, *, seed: int = 0) -> None:
        self.setup = setup
        self.now = 0.0
        self.instances = [Instance(number) for number in range(setup.num_instances)]
        self.random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heappush(self._events, (when, next(self._numbers), action))

    def run(self) -> None:
        while self._events:
            self.now, _, action = heappop(self._events)
            action()

    def prompt(self, item: Item) -> Prompt:
        setup = self.setup
        noise = 1 + self.random.uniform(-setup.estimate_noise, setup.estimate_noise)
        computed_s = setup.speed.of_chunk(0, item.num_prompt_tokens)
        arrived_at = item.at_s + setup.client_s / 2
        by = arrived_at + (1 - setup.slack_share) * setup.ttft_s
        expected_s = computed_s * (1 + setup.estimate_bias) * noise
        return Prompt(arrived_at, by, expected_s, num_tokens=item.num_prompt_tokens)

    def start(self, instance: Instance, prompt: Prompt) -> None:
        instance.prompts.append(prompt)
        instance.slots_used += 1
        if not instance.in_step:
            self._step(instance)

    def can_accept(self, instance: Instance, num_tokens: int = 1) -> bool:
        left = instance.num_uncomputed()
        fits = left == 0 or left + num_tokens <= self.setup.max_step_tokens
        return fits and instance.slots_used < self.setup.slots

    def changed(self, instance: Instance) -> None:
        """Is called when a step has begun, and when a slot has become free."""

    def prefilled(self, instance: Instance) -> None:
        """Is called when a prompt has been computed."""

    def _step(self, instance: Instance) -> None:
        budget, seconds = self.setup.max_step_tokens, self.setup.speed.step_s
        for prompt in instance.prompts:
            chunk = min(budget, prompt.num_tokens - prompt.num_computed)
            if chunk:
                instance.in_step[prompt] = chunk
                seconds += self.setup.speed.of_chunk(prompt.num_computed, chunk)
                budget -= chunk
        instance.step_ends_at = self.now + seconds
        self.at(instance.step_ends_at, partial(self._step_done, instance))
        self.changed(instance)

    def _step_done(self, instance: Instance) -> None:
        for prompt, chunk in instance.in_step.items():
            prompt.num_computed += chunk
            if prompt.num_computed == prompt.num_tokens:
                prompt.first_token_at = self.now + self.setup.client_s / 2 + self.setup.message_s
                instance.prompts.remove(prompt)
                self.prefilled(instance)
                self.at(self.now + self.setup.fetch_s, partial(self._fetched, instance))
        instance.in_step.clear()
        if instance.prompts:
            self._step(instance)
        else:
            self.changed(instance)

    def _fetched(self, instance: Instance) -> None:
        instance.slots_used -= 1
        self.changed(instance)


class PlainQueue(Simulation):
    """Each instance queues, the instance with the fewest open prompts is chosen, and nothing is shed. All gateways know
    all open prompts, which is in favour of this way."""

    def __init__(self, setup: Setup, *, seed: int = 0) -> None:
        super().__init__(setup, seed=seed)
        self._num_open = [0] * setup.num_instances

    def play(self, items: Sequence[Item]) -> list[Prompt]:
        prompts = [self.prompt(one) for one in items]
        for prompt in prompts:
            self.at(prompt.arrived_at, partial(self._arrive, prompt))
        self.run()
        return prompts

    def prefilled(self, instance: Instance) -> None:
        self._num_open[instance.number] -= 1

    def _arrive(self, prompt: Prompt) -> None:
        instance = min(self.instances, key=lambda one: (self._num_open[one.number], self.random.random()))
        self._num_open[instance.number] += 1
        self.at(self.now + self.setup.message_s, partial(self.start, instance, prompt))


class OnDemand(Simulation):
    """Requests wait in the gateways, which ask one instance at a time for the first request in their order."""

    def __init__(
        self, setup: Setup, *, order: Order = service_order, hopeless: Hopeless = is_hopeless, seed: int = 0
    ) -> None:
        super().__init__(setup, seed=seed)
        self._order, self._hopeless = order, hopeless
        self._waiting: list[list[Prompt]] = [[] for _ in range(setup.num_gateways)]
        self._views = [[View() for _ in self.instances] for _ in range(setup.num_gateways)]
        self._is_asking = [False] * setup.num_gateways

    def play(self, items: Sequence[Item]) -> list[Prompt]:
        prompts = [self.prompt(one) for one in items]
        for prompt in prompts:
            gateway = self.random.randrange(self.setup.num_gateways)
            self.at(prompt.arrived_at, partial(self._arrive, gateway, prompt))
        self.run()
        return prompts

    def _arrive(self, gateway: int, prompt: Prompt) -> None:
        self._waiting[gateway].append(prompt)
        self._dispatch(gateway)

    def _dispatch(self, gateway: int) -> None:
        waiting, views = self._waiting[gateway], self._views[gateway]
        waiting[:] = [one for one in waiting if not self._hopeless(one, self.now)]
        open_views = [number for number, view in enumerate(views) if not view.is_full]
        if self._is_asking[gateway] or not waiting or not open_views:
            return
        free_in_s = [max(0.0, view.free_at - self.now) for view in views]
        prompt = self._order(waiting, free_in_s, self.now)[0]
        instance = self.instances[min(open_views, key=lambda number: (free_in_s[number], self.random.random()))]
        waiting.remove(prompt)
        self._is_asking[gateway] = True
        self.at(self.now + self.setup.message_s, partial(self._asked, gateway, instance, prompt))

    def _asked(self, gateway: int, instance: Instance, prompt: Prompt) -> None:
        is_accepted = self.can_accept(instance, prompt.num_tokens)
        if is_accepted:
            self.start(instance, prompt)
        is_full = not is_accepted or not self.can_accept(instance)
        if is_full:
            instance.rejected.add(gateway)
        starts_in_s = self._starts_in_s(instance)
        rejected = None if is_accepted else prompt
        self.at(
            self.now + self.setup.message_s,
            partial(self._replied, gateway, instance, rejected, is_full, starts_in_s),
        )

    def _replied(
        self, gateway: int, instance: Instance, rejected: Prompt | None, is_full: bool, starts_in_s: float
    ) -> None:
        view = self._views[gateway][instance.number]
        view.is_full = is_full and gateway in instance.rejected
        view.free_at = self.now + starts_in_s
        self._is_asking[gateway] = False
        if rejected is not None:
            self._waiting[gateway].append(rejected)
        self._dispatch(gateway)

    def changed(self, instance: Instance) -> None:
        if instance.num_uncomputed() or not self.can_accept(instance):
            return
        starts_in_s = self._starts_in_s(instance)
        gateways = sorted(instance.rejected)
        self.random.shuffle(gateways)
        for gateway in gateways:
            self.at(self.now + self.setup.message_s, partial(self._slot_freed, gateway, instance, starts_in_s))
        instance.rejected.clear()

    def _slot_freed(self, gateway: int, instance: Instance, starts_in_s: float) -> None:
        view = self._views[gateway][instance.number]
        view.is_full, view.free_at = False, self.now + starts_in_s
        self._dispatch(gateway)

    def _starts_in_s(self, instance: Instance) -> float:
        seconds = max(0.0, instance.step_ends_at - self.now) if instance.in_step else 0.0
        for prompt in instance.prompts:
            done = prompt.num_computed + instance.in_step.get(prompt, 0)
            seconds += self.setup.speed.of_chunk(done, prompt.num_tokens - done) * (1 + self.setup.estimate_bias)
        return seconds


def num_in_time(prompts: Sequence[Prompt], items: Sequence[Item], ttft_s: float) -> int:
    return sum(prompt.first_token_at - item.at_s <= ttft_s for prompt, item in zip(prompts, items, strict=True))


def main() -> None:
    arguments = _arguments()
    items = read_trace(arguments.trace, arguments.factor, longest=LONGEST)
    speed = Speed(0.002 * arguments.slowness, 2.7e-4 * arguments.slowness, 2.3e-7 * arguments.slowness)
    setup = Setup(
        num_instances=arguments.prefill,
        num_gateways=arguments.gateways,
        ttft_s=arguments.ttft_ms / 1000,
        estimate_bias=arguments.bias,
        estimate_noise=arguments.noise,
        speed=speed,
    )
    for half in HALVES if arguments.half == "both" else [arguments.half]:
        part = half_of(items, half)
        per_s = arguments.base * speed.capacity(part, arguments.prefill)
        for load in arguments.loads:
            _print(half, load, setup, at_rate(part, per_s * load, arguments.seconds))


def _print(half: str, load: float, setup: Setup, items: Sequence[Item]) -> None:
    queue = num_in_time(PlainQueue(setup).play(items), items, setup.ttft_s)
    on_demand = num_in_time(OnDemand(setup).play(items), items, setup.ttft_s)
    arrived_at = [one.at_s for one in items]
    service_s = [setup.speed.of_chunk(0, one.num_prompt_tokens) for one in items]
    best = best_in_hindsight(arrived_at, service_s, setup.ttft_s, setup.num_instances)
    bound = upper_bound(arrived_at, service_s, setup.ttft_s, setup.num_instances)
    print(
        f"{half:>6} half at {load:g}x: {len(items)} requests; queue {queue / len(items):.1%}, "
        f"on demand {on_demand / len(items):.1%} in time ({on_demand / max(1, best):.2f} of the best in hindsight, "
        f"{best / len(items):.1%}; at most {bound / len(items):.1%})"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--half", choices=[*HALVES, "both"], default="both")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 5], help="multiples of the base load")
    parser.add_argument("--base", type=float, default=0.22, help="load 1, as a share of what prefill can compute")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each point")
    parser.add_argument("--factor", type=float, default=0.25, help="of lengths")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--bias", type=float, default=0.0, help="by which share all estimates are too long")
    parser.add_argument("--noise", type=float, default=0.0, help="by which share single estimates err at most")
    parser.add_argument("--slowness", type=float, default=1.0, help="1: a prompt of 500 tokens takes 0.17 s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
