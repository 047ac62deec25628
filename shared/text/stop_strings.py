"""Stop strings over a stream of text pieces. Pure; what a match means for the request is not decided here."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string.

    The first is the one whose last character comes first, and of two that end together the longer: this does not depend
    on how the text is cut into pieces. What could be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "a stop string must not be empty"
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is safe to show after this piece. Sets `matched` at a match; then feed no more."""
        assert self.matched is None
        if not self._stop:
            return piece
        text = self._held + piece
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        num_shown = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[num_shown:]
        return text[:num_shown]

    def flush(self) -> str:
        """What is still held back, once no more text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
