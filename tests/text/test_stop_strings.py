import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text.stop_strings import StopStrings

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


class NaiveStopStrings:
    """The same by searching the text for each stop string, which costs more the more of them there are."""

    def __init__(self, stop: list[str]) -> None:
        self._stop = stop
        self._pending = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        text = self._pending + piece
        ends = [(start + len(stop), -len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            return text[: end - len(self.matched)]
        num_shown = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[num_shown:]
        return text[:num_shown]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def run(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    strings = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += strings.feed(piece)
        if strings.matched is not None:
            return shown, strings.matched
    return shown + strings.flush(), None


def first_match(text: str, stop: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_the_first_match_cuts_however_the_text_is_cut_into_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert run(pieces, stop) == first_match(text, stop)


@given(TEXTS, STOPS)
def test_text_that_is_out_never_belongs_to_a_later_match(text: str, stop: list[str]) -> None:
    expected, _ = first_match(text, stop)
    strings = StopStrings(stop)
    shown = ""
    for character in text:
        shown += strings.feed(character)
        assert expected.startswith(shown)
        if strings.matched is not None:
            break


@given(st.lists(st.text("ab", max_size=6), max_size=20), st.lists(st.text("ab", min_size=1, max_size=7), max_size=6))
def test_each_piece_shows_what_the_naive_search_shows(pieces: list[str], stop: list[str]) -> None:
    strings, naive = StopStrings(stop), NaiveStopStrings(stop)
    for piece in pieces:
        assert strings.feed(piece) == naive.feed(piece)
        assert strings.matched == naive.matched
        if strings.matched is not None:
            return


def num_calls(action: Callable[[], object]) -> int:
    """How many Python functions `action` calls, as a measure of cost that does not depend on the machine."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("stop", [["x"], ["a" * 1024], [f"{'a' * 1000}{number}" for number in range(16)]])
def test_a_token_costs_the_same_whatever_the_stop_strings_are(stop: list[str]) -> None:
    """The worst text for a naive search: each token might complete a stop string and does not."""
    strings = StopStrings(stop)
    text = ("a" * 999 + "b") * 10
    calls = num_calls(lambda: [strings.feed(text[start : start + 4]) for start in range(0, len(text), 4)])
    # one search and one feed per piece, and per character two steps of the automaton at most
    assert calls < 8 * len(text)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["\n\n", "END"])
    assert strings.feed("one\n") == "one"
    assert strings.feed("two E") == "\ntwo "
    assert strings.feed("N") == ""
    assert strings.feed("ough") == "ENough"
    assert strings.feed("EN") == ""
    assert strings.flush() == "EN"


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).feed("anything") == "anything"
