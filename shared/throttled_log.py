"""Warnings that anybody outside could cause in any number: one per second is logged, and the others are counted."""

import logging
import time

INTERVAL_S = 1.0


class ThrottledWarnings:
    """Logs a kind of warning once per `INTERVAL_S`; the next one says how many were left out."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged_at = float("-inf")
        self._num_left_out = 0

    def warning(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._logged_at < INTERVAL_S:
            self._num_left_out += 1
            return
        self._log.warning(f"{message} (and %d times since the last such warning)", *args, self._num_left_out)
        self._logged_at, self._num_left_out = now, 0
