"""The latest decisions with their reasons, as `pdserve status` shows them."""

import logging
import time
from collections import deque

from shared.messages.control import DecisionStatus

KEPT = 50

log = logging.getLogger(__name__)


class Decision:
    """One decision. Its outcome is written once it is known."""

    def __init__(self, group: str, what: str, why: str) -> None:
        self.at = time.time()
        self.group = group
        self.what = what
        self.why = why
        self.outcome = ""
        self.error: Exception | None = None
        """What it failed by."""

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        log.info("%s: %s: %s", self.group, self.what, outcome)


class Decisions:
    """The latest ones, oldest first."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=KEPT)

    def take(self, group: str, what: str, why: str) -> Decision:
        """A decision has been taken; one that says the same as the last before it is that one."""
        last = self._kept[-1] if self._kept else None
        if last is not None and (last.group, last.what) == (group, what) and last.outcome == "advised":
            last.why = why
            return last
        log.info("%s: %s, since %s", group, what, why)
        decision = Decision(group, what, why)
        self._kept.append(decision)
        return decision

    def status(self) -> list[DecisionStatus]:
        return [
            DecisionStatus(at=one.at, group=one.group, what=one.what, why=one.why, outcome=one.outcome)
            for one in self._kept
        ]
