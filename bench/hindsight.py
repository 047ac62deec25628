"""How many first tokens any schedule of prefill could deliver in time, if it knew all requests in advance.

- The *best in hindsight* is the best schedule that a beam search finds: others can be better, but not by much.
- *At most* is an upper bound: no schedule can be better.

Both take nothing into account but the seconds that prompts take: no steps, no messages, no handoff.
"""

from collections.abc import Sequence
from math import inf

BEAM_WIDTH = 300
WORK_WEIGHTS = (1.0, 2.0, 4.0, 8.0)
"""How many mean service times of work ahead count as much as one first token in time, in one search after another."""


def best_in_hindsight(
    arrived_at: Sequence[float], service_s: Sequence[float], ttft_s: float, num_instances: int
) -> int:
    """Returns how many first tokens the best schedule delivers in time that was found with all arrivals known.

    Prompts are computed one after another, without interruption, and nothing else takes time. As deadlines follow
    arrivals, each instance may compute its prompts in the order of arrival. So a schedule says for each prompt, in that
    order, which instance computes it, or none. Of the schedules up to a prompt, a beam search keeps those with the most
    first tokens in time and the least work ahead.
    """
    jobs = [one for one in sorted(zip(arrived_at, service_s, strict=True)) if one[1] <= ttft_s]
    if not jobs:
        return 0
    mean_s = sum(seconds for _, seconds in jobs) / len(jobs)
    return max(_beam_search(jobs, ttft_s, num_instances, weight * mean_s) for weight in WORK_WEIGHTS)


def _beam_search(
    jobs: Sequence[tuple[float, float]], ttft_s: float, num_instances: int, token_is_worth_s: float
) -> int:
    beam = {(0.0,) * num_instances: 0}
    """By when instances are free, ascending: first tokens in time."""
    for at, seconds in jobs:
        extended: dict[tuple[float, ...], int] = {}
        for free_at, number in beam.items():
            free_at = tuple(max(free, at) for free in free_at)
            extended[free_at] = max(number, extended.get(free_at, 0))
            for index, free in enumerate(free_at):
                if free + seconds > at + ttft_s:
                    break
                if index == 0 or free != free_at[index - 1]:
                    taken = tuple(sorted((*free_at[:index], free + seconds, *free_at[index + 1 :])))
                    extended[taken] = max(number + 1, extended.get(taken, 0))
        best_first = sorted(extended.items(), key=lambda one: sum(one[0]) / token_is_worth_s - one[1])
        beam = dict(best_first[:BEAM_WIDTH])
    return max(beam.values())


def upper_bound(arrived_at: Sequence[float], service_s: Sequence[float], ttft_s: float, num_instances: int) -> int:
    """Returns how many first tokens no schedule can exceed, even one that knows all arrivals in advance.

    Two things are made easier than they are: instances work together on each prompt, as one that is so many times as
    fast, and nothing else takes time. Prompts that take longer than the objective at one instance are left out. For
    one machine, and deadlines in the order of arrivals, the largest number in time is exact: take prompts by arrival,
    and whenever the last would be late leave out the one without which the others end first (H. Kise, T. Ibaraki,
    H. Mine, "A solvable case of the one-machine scheduling problem with ready and due times", Operations Research 26
    (1978)).
    """
    chosen: list[tuple[float, float]] = []  # of the current busy period and before: arrival, seconds
    for at, alone_s in sorted(zip(arrived_at, service_s, strict=True)):
        if alone_s > ttft_s:
            continue
        chosen.append((at, alone_s / num_instances))
        if _ends_at(chosen) > at + ttft_s:
            del chosen[_best_left_out(chosen)]
    return len(chosen)


def _ends_at(jobs: Sequence[tuple[float, float]]) -> float:
    end = -inf
    for at, seconds in jobs:
        end = max(end, at) + seconds
    return end


def _best_left_out(jobs: Sequence[tuple[float, float]]) -> int:
    """The job without which the others end first."""
    # The jobs from i on end at max(begin + sums[i], ends[i]) if they may begin at `begin`.
    sums, ends = [0.0] * (len(jobs) + 1), [-inf] * (len(jobs) + 1)
    for index in range(len(jobs) - 1, -1, -1):
        at, seconds = jobs[index]
        sums[index] = sums[index + 1] + seconds
        ends[index] = max(at + seconds + sums[index + 1], ends[index + 1])
    best, best_end, before = 0, inf, -inf
    for index, (at, seconds) in enumerate(jobs):
        end = max(before + sums[index + 1], ends[index + 1])
        if end <= best_end:
            best, best_end = index, end
        before = max(before, at) + seconds
    return best
