"""A group in simulated time: clients with one request each at any time, one gateway's lines, and instances with slots.

It knows more than the model of ratio control does: lengths vary, prompts cost more per token the longer they are, and
rows of decode steps the more tokens their requests have; slots are held until KV is fetched, and fetching takes time;
who changes its role ends or moves what it holds first; and all that is measured is wrong. KV of an instance on its way
to another role is fetched before that of others.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

from services.controller.policy.load import GroupLoad
from services.controller.policy.ratio import Move
from shared.messages.records import Role

READ_EVERY_S = 0.25
NUM_READINGS = 10
"""Of one window."""
NOISE = 0.1
"""What is measured is wrong by up to this share, by another one in each window."""
NOISY = (
    "num_open",
    "done_per_s",
    "prefill_s",
    "step_base_s",
    "step_row_s",
    "output_tokens",
    "held_prefill_s",
    "e2e_s",
    "ttft_s",
    "tpot_s",
)
PREFILL_SLOTS, DECODE_SLOTS = 8, 64
ASK_AGAIN_S = 0.02
FETCH_S = 0.03
MOVE_AFTER_S = 1.0
CANARY_S = 0.5


@dataclass(frozen=True, slots=True)
class Mix:
    """Mean tokens of requests. Prompts vary as the sum of two exponential lengths, outputs as one."""

    prompt_tokens: float
    output_tokens: float


CODE = Mix(2048, 28)
CONVERSATION = Mix(1155, 211)

PREFILL_TOKEN_S, PREFILL_PAIR_S = 40e-6, 4e-9
"""Of each token, and of each token with each other."""
STEP_BASE_S, STEP_ROW_S, STEP_TOKEN_S = 12e-3, 0.15e-3, 0.08e-6
"""Of a decode step, of each row, and of each token that a row's request has."""
STEP_NOISE = 0.05


@dataclass(slots=True, eq=False)
class Request:
    """`steps_left` after its first token, of decode steps; `prefill` holds its KV."""

    prompt_tokens: int
    output_tokens: int
    arrived_at: float
    steps_left: float
    prefill: "Instance | None" = None
    prefill_at: float = 0.0
    decode_at: float = 0.0

    @property
    def prefill_s(self) -> float:
        return self.prompt_tokens * PREFILL_TOKEN_S + self.prompt_tokens**2 * PREFILL_PAIR_S

    @property
    def row_s(self) -> float:
        return STEP_ROW_S + (self.prompt_tokens + self.output_tokens / 2) * STEP_TOKEN_S


@dataclass(slots=True, eq=False)
class Instance:
    """Prompts are computed one by one. `batch` is by the step, counted in `steps`, after which each request is done."""

    role: Role
    serving: bool = True
    num_held: int = 0
    num_leased: int = 0
    prompts: deque[Request] = field(default_factory=deque)
    batch: list[tuple[float, int, Request]] = field(default_factory=list)
    steps: float = 0.0
    rows_s: float = 0.0
    slowness: float = 1.0
    advanced_at: float = 0.0
    version: int = 0
    """Of the batch: what was planned for another one does not happen."""

    @property
    def step_s(self) -> float:
        return (STEP_BASE_S + self.rows_s) * self.slowness


@dataclass(slots=True)
class Totals:
    """Sums since the beginning; `open`, `waiting` and `leased` over readings."""

    arrived: float = 0.0
    refused: float = 0.0
    prefilled: float = 0.0
    prefill_s: float = 0.0
    fetched: float = 0.0
    held_prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    steps: float = 0.0
    rows: float = 0.0
    rows_squared: float = 0.0
    rows_s: float = 0.0
    done: float = 0.0
    held_decode_s: float = 0.0
    e2e_s: float = 0.0
    open: float = 0.0
    waiting: float = 0.0
    leased: float = 0.0

    def minus(self, other: "Totals") -> "Totals":
        return Totals(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(Totals)))


class Simulation:
    """One group.

    Args:
        split: instances of prefill and of decode at the beginning.
        num_clients: each sends its next request when the last is done.
        mix: of requests from now on; to be changed at will.
    """

    def __init__(self, split: tuple[int, int], num_clients: int, mix: Mix, seed: int) -> None:
        self.now = 0.0
        self.mix = mix
        self.totals = Totals()
        self._random = random.Random(seed)
        self._num_clients = num_clients
        self._instances = [Instance("prefill") for _ in range(split[0])] + [Instance("decode") for _ in range(split[1])]
        self._prefill_line: deque[Request] = deque()
        self._decode_line: deque[Request] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._monitor = Monitor(seed)
        for _ in range(num_clients):
            self._arrive()

    @property
    def split(self) -> tuple[int, int]:
        """Instances of prefill and of decode that serve."""
        return len(self._serving("prefill")), len(self._serving("decode"))

    def read(self) -> GroupLoad | None:
        """Goes on to the next reading: what the last window was like, None until there has been one."""
        self._run_until(self.now + READ_EVERY_S)
        for one in self._instances:
            self._advance(one)
        self.totals.open += self._num_clients
        self.totals.waiting += len(self._prefill_line)
        self.totals.leased += sum(one.num_leased for one in self._instances)
        if self._prefill_line:
            self.totals.refused += len(self._serving("prefill")) * READ_EVERY_S / ASK_AGAIN_S
        return self._monitor.load(self.totals, self.split)

    def change(self, move: Move) -> None:
        """Begins to give another role to those that hold the least."""
        for one in sorted(self._serving(move.from_role), key=lambda one: one.num_held)[: move.number]:
            one.serving = False
            if one.role == "decode":
                self._after(MOVE_AFTER_S, partial(self._move_requests, one))
            self._change_if_empty(one)

    def _run_until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = end

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def _serving(self, role: Role) -> list[Instance]:
        return [one for one in self._instances if one.serving and one.role == role]

    def _choose(self, role: Role, num_slots: int) -> Instance | None:
        """The one that holds the least, of those with a free slot."""
        chosen, least = None, num_slots
        for one in self._instances:
            if one.num_held < least and one.serving and one.role == role:
                chosen, least = one, one.num_held
        return chosen

    def _arrive(self) -> None:
        prompt = 1 + int(self._random.gammavariate(2, self.mix.prompt_tokens / 2))
        output = 1 + int(self._random.expovariate(1 / (self.mix.output_tokens - 0.5)))
        self.totals.arrived += 1
        self._prefill_line.append(Request(prompt, output, self.now, output - 1))
        self._fill_prefill()

    def _fill_prefill(self) -> None:
        while self._prefill_line and (chosen := self._choose("prefill", PREFILL_SLOTS)):
            request = self._prefill_line.popleft()
            request.prefill, request.prefill_at = chosen, self.now
            chosen.num_held += 1
            chosen.prompts.append(request)
            if len(chosen.prompts) == 1:
                self._after(request.prefill_s, partial(self._prefilled, chosen))

    def _prefilled(self, one: Instance) -> None:
        request = one.prompts.popleft()
        if one.prompts:
            self._after(one.prompts[0].prefill_s, partial(self._prefilled, one))
        self.totals.prefilled += 1
        self.totals.prefill_s += request.prefill_s
        self.totals.ttft_s += self.now - request.arrived_at
        one.num_leased += 1
        if request.steps_left:
            self._decode_line.append(request)
            self._fill_decode()
        else:
            self._let_go_of_kv(request)
            self._done(request)

    def _fill_decode(self) -> None:
        while self._decode_line and (chosen := self._choose("decode", DECODE_SLOTS)):
            request = self._next_for_decode()
            request.decode_at = self.now
            chosen.num_held += 1
            self._after(FETCH_S, partial(self._join, chosen, request))

    def _next_for_decode(self) -> Request:
        if all(one.serving for one in self._instances):
            return self._decode_line.popleft()
        leaving = (one for one in self._decode_line if one.prefill and not one.prefill.serving)
        request = next(leaving, self._decode_line[0])
        self._decode_line.remove(request)
        return request

    def _let_go_of_kv(self, request: Request) -> None:
        if one := request.prefill:
            request.prefill = None
            self.totals.fetched += 1
            self.totals.held_prefill_s += self.now - request.prefill_at
            one.num_held -= 1
            one.num_leased -= 1
            self._change_if_empty(one)
            self._fill_prefill()

    def _join(self, one: Instance, request: Request) -> None:
        self._let_go_of_kv(request)
        self._advance(one)
        heapq.heappush(one.batch, (one.steps + request.steps_left, next(self._order), request))
        one.rows_s += request.row_s
        self._await_next(one)

    def _advance(self, one: Instance) -> None:
        rows, seconds = len(one.batch), self.now - one.advanced_at
        one.advanced_at = self.now
        if rows and seconds:
            steps = seconds / one.step_s
            one.steps += steps
            self.totals.decode_s += seconds
            self.totals.steps += steps
            self.totals.rows += steps * rows
            self.totals.rows_squared += steps * rows**2
            self.totals.rows_s += seconds * rows

    def _await_next(self, one: Instance) -> None:
        one.version += 1
        if one.batch:
            one.slowness = self._random.uniform(1 - STEP_NOISE, 1 + STEP_NOISE)
            self._after((one.batch[0][0] - one.steps) * one.step_s, partial(self._end_first, one, one.version))

    def _end_first(self, one: Instance, version: int) -> None:
        if version == one.version:
            self._advance(one)
            _, _, request = heapq.heappop(one.batch)
            self._leave(one, request)
            self._await_next(one)
            self._done(request)

    def _leave(self, one: Instance, request: Request) -> None:
        one.rows_s = one.rows_s - request.row_s if one.batch else 0.0
        one.num_held -= 1
        self.totals.held_decode_s += self.now - request.decode_at
        self._change_if_empty(one)
        self._fill_decode()

    def _done(self, request: Request) -> None:
        self.totals.done += 1
        self.totals.e2e_s += self.now - request.arrived_at
        self._arrive()

    def _move_requests(self, one: Instance) -> None:
        if one.serving:
            return
        self._advance(one)
        left, one.batch = one.batch, []
        for end, _, request in left:
            request.steps_left = end - one.steps
            self._decode_line.appendleft(request)
            self._leave(one, request)
        self._await_next(one)

    def _change_if_empty(self, one: Instance) -> None:
        if not one.serving and not one.num_held:
            self._after(CANARY_S, partial(self._play_other_role, one))

    def _play_other_role(self, one: Instance) -> None:
        one.role = "decode" if one.role == "prefill" else "prefill"
        one.serving = True
        one.advanced_at = self.now
        self._fill_prefill()
        self._fill_decode()


class Monitor:
    """Turns readings of totals into loads, and makes them wrong."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._readings: deque[Totals] = deque([Totals()], maxlen=NUM_READINGS + 1)
        self._num_loads = 0
        self._factors: dict[str, float] = {}

    def load(self, totals: Totals, split: tuple[int, int]) -> GroupLoad | None:
        self._readings.append(replace(totals))
        if len(self._readings) <= NUM_READINGS:
            return None
        if self._num_loads % NUM_READINGS == 0:
            self._factors = {name: self._random.uniform(1 - NOISE, 1 + NOISE) for name in NOISY}
        self._num_loads += 1
        load = _load(totals.minus(self._readings[0]), split)
        figures = {name: getattr(load, name) for name in NOISY}
        return replace(load, **{name: value and value * self._factors[name] for name, value in figures.items()})


def _load(seen: Totals, split: tuple[int, int]) -> GroupLoad:
    window_s = NUM_READINGS * READ_EVERY_S
    num_prefill, num_decode = split
    base_s, row_s = _fit(seen)
    return GroupLoad(
        window_s=window_s,
        num_prefill=num_prefill,
        num_decode=num_decode,
        prefill_slots=PREFILL_SLOTS,
        decode_slots=DECODE_SLOTS,
        num_open=seen.open / NUM_READINGS,
        num_waiting=seen.waiting / NUM_READINGS,
        num_leased=seen.leased / NUM_READINGS,
        arrivals_per_s=seen.arrived / window_s,
        done_per_s=seen.done / window_s,
        refusals_per_s=seen.refused / window_s,
        prefill_s=_mean(seen.prefill_s, seen.prefilled),
        step_base_s=base_s,
        step_row_s=row_s,
        output_tokens=_mean(seen.rows + seen.done, seen.done),
        prefill_busy=min(1.0, seen.prefill_s / window_s / max(1, num_prefill)),
        decode_busy=min(1.0, seen.decode_s / window_s / max(1, num_decode)),
        held_prefill_s=_mean(seen.held_prefill_s, seen.fetched),
        held_decode_s=_mean(seen.held_decode_s, seen.done),
        e2e_s=_mean(seen.e2e_s, seen.done),
        ttft_s=_mean(seen.ttft_s, seen.prefilled),
        tpot_s=_mean(seen.rows_s, seen.rows),
    )


def _mean(total: float, number: float) -> float | None:
    return total / number if number else None


def _fit(seen: Totals) -> tuple[float | None, float | None]:
    """Base and row seconds of a step, by least squares, neither below 0."""
    if not seen.rows:
        return None, None
    spread = seen.steps * seen.rows_squared - seen.rows**2
    row_s = (seen.steps * seen.rows_s - seen.rows * seen.decode_s) / spread if spread > 0 else 0.0
    row_s = min(max(0.0, row_s), seen.decode_s / seen.rows)
    return (seen.decode_s - row_s * seen.rows) / seen.steps, row_s
