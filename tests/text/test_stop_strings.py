from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shared.text.stop_strings import StopStrings

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


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
