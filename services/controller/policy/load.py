"""What a group has been doing over the last window: all that ratio control looks at."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One group over `window_s` seconds. None where the window had nothing to measure it by.

    Attributes:
        num_prefill, num_decode: instances that serve.
        prefill_slots, decode_slots: of one instance, on average.
        num_open: requests in the system now, averaged over the window: waiting, in prefill, in decode.
        num_waiting: those of them that wait in gateways.
        num_leased: prefill slots whose KV waits to be fetched.
        arrivals_per_s, done_per_s: requests.
        refusals_per_s: for want of slots, of both roles.
        prefill_s: seconds of prefill engines for each request, alone: exclusive of waiting. Prompts that stay at decode
            instances take none.
        step_base_s, step_row_s: a decode step of `rows` rows takes step_base_s + rows * step_row_s.
        output_tokens: of a request, on average.
        prefill_busy, decode_busy: the share of the window in which engines computed, 0 .. 1.
        held_prefill_s, held_decode_s: for how long a request held a slot (T_p, T_d).
        e2e_s, ttft_s, tpot_s: as clients saw them.
    """

    window_s: float
    num_prefill: int
    num_decode: int
    prefill_slots: float = 8.0
    decode_slots: float = 64.0
    num_open: float = 0.0
    num_waiting: float = 0.0
    num_leased: float = 0.0
    arrivals_per_s: float = 0.0
    done_per_s: float = 0.0
    refusals_per_s: float = 0.0
    prefill_s: float | None = None
    step_base_s: float | None = None
    step_row_s: float | None = None
    output_tokens: float | None = None
    prefill_busy: float = 0.0
    decode_busy: float = 0.0
    held_prefill_s: float | None = None
    held_decode_s: float | None = None
    e2e_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
