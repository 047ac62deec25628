"""The places of instances that were lost, kept for their successors."""

from collections import deque
from dataclasses import dataclass, field

from services.controller.policy.membership import Place

VACANT_S = 60.0
"""For how long the place of a lost instance is kept for the next that comes."""
NEWCOMER_S = 10.0
"""How long after it came an instance may turn out to be the successor of one that was lost before."""


@dataclass(slots=True)
class Vacancies:
    """Vacant places, and who came lately without taking one. Times are the controller's own clock, in seconds."""

    _vacant: deque[tuple[float, Place]] = field(default_factory=deque)
    _newcomers: deque[tuple[float, Place]] = field(default_factory=deque)

    @property
    def places(self) -> tuple[Place, ...]:
        """The vacant ones, the latest last."""
        return tuple(place for _, place in self._vacant)

    def forget_old(self, now: float) -> None:
        """Places that nobody took in time are no more kept."""
        for kept, for_s in ((self._vacant, VACANT_S), (self._newcomers, NEWCOMER_S)):
            while kept and kept[0][0] < now - for_s:
                kept.popleft()

    def vacate(self, place: Place, now: float) -> None:
        """An instance was lost. Its successor may have come before that was noticed: then nothing is vacant."""
        successor = next((one for one in self._newcomers if one[1].group == place.group), None)
        if successor is not None:
            self._newcomers.remove(successor)
        else:
            self._vacant.append((now, place))

    def come_back(self, place: Place) -> None:
        """One that was taken for lost is there again, or another leader's: its place is not vacant."""
        vacant = next((one for one in self._vacant if one[1] == place), None)
        if vacant is not None:
            self._vacant.remove(vacant)

    def fill(self, place: Place, now: float) -> None:
        """Somebody joins there: a vacant place is taken, or there is one more than before."""
        before = len(self._vacant)
        self.come_back(place)
        if len(self._vacant) == before:
            self._newcomers.append((now, place))
