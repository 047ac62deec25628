"""Stop strings over a stream of text pieces. Pure; what a match means for the request is not decided here."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string.

    The first is the one whose last character comes first, and of two that end together the longer: this does not depend
    on how the text is cut into pieces. What could be the beginning of a stop string is held back. The cost of a piece
    grows with its length only, not with the number or the content of the stop strings.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "a stop string must not be empty"
        self._automaton = _Automaton(stop) if stop else None
        self._state = _Automaton.START
        self._pending = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Returns the text that is safe to show after this piece. Sets `matched` at a match; then feed no more."""
        assert self.matched is None
        automaton = self._automaton
        if automaton is None:
            return piece
        text = self._pending + piece
        state = self._state
        for end, character in enumerate(piece, start=len(self._pending) + 1):
            state = automaton.advance(state, character)
            if (matched := automaton.matches[state]) is not None:
                self.matched = matched
                self._pending = ""
                return text[: end - len(matched)]
        self._state = state
        num_shown = len(text) - automaton.depths[state]
        self._pending = text[num_shown:]
        return text[:num_shown]

    def flush(self) -> str:
        """Returns what is still held back, once no more text follows."""
        pending, self._pending = self._pending, ""
        return pending


class _Automaton:
    """The automaton of Aho and Corasick (doi 10.1145/360825.360855): finds all patterns in one pass over a text.

    A state stands for the longest end of the text so far that begins a pattern.

    Attributes:
        depths: by state, how many characters that end of the text has.
        matches: by state, the longest pattern that ends here; None where no pattern does.
    """

    START = 0

    def __init__(self, patterns: Sequence[str]) -> None:
        self.depths = [0]
        self.matches: list[str | None] = [None]
        self._fallbacks = [self.START]
        """By state, the state of the longest shorter end of the text that begins a pattern."""
        self._edges: dict[tuple[int, str], int] = {}
        # Breadth first: a fallback is shorter than its state, so that it is complete before it is needed.
        states = [self.START] * len(patterns)
        for depth in range(max(map(len, patterns), default=0)):
            for index, pattern in enumerate(patterns):
                if depth < len(pattern):
                    states[index] = self._extend(states[index], pattern[depth])
                    if depth == len(pattern) - 1:
                        self.matches[states[index]] = pattern

    def advance(self, state: int, character: str) -> int:
        """Returns the state after one more character; constant time, averaged over the characters of a text."""
        while (following := self._edges.get((state, character))) is None:
            if state == self.START:
                return self.START
            state = self._fallbacks[state]
        return following

    def _extend(self, state: int, character: str) -> int:
        following = self._edges.get((state, character))
        if following is None:
            following = len(self.depths)
            fallback = self.START if state == self.START else self.advance(self._fallbacks[state], character)
            self.depths.append(self.depths[state] + 1)
            self.matches.append(self.matches[fallback])
            self._fallbacks.append(fallback)
            self._edges[state, character] = following
        return following
