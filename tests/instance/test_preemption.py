"""Who is given up; pure."""

from shared.instance.preemption import RequestAge, next_victim


def age(request_id: str, arrived_at: float, *, waits: bool = False, is_ending: bool = False) -> RequestAge:
    return RequestAge(arrived_at, request_id, waits, is_ending)


def test_nobody_while_nobody_waits() -> None:
    assert next_victim([]) is None
    assert next_victim([age("a", 1.0), age("b", 2.0)]) is None


def test_the_youngest_goes_first_and_the_oldest_last() -> None:
    held = [age("b", 2.0), age("c", 3.0), age("a", 1.0, waits=True)]
    assert next_victim(held) == "c"
    assert next_victim(held[:1] + held[2:]) == "b"


def test_the_youngest_goes_even_if_it_is_the_one_that_waits() -> None:
    assert next_victim([age("a", 1.0), age("b", 2.0, waits=True)]) == "b"


def test_nobody_while_somebody_is_ending() -> None:
    assert next_victim([age("a", 1.0, waits=True), age("b", 2.0), age("c", 3.0, is_ending=True)]) is None


def test_of_the_same_age_the_id_decides() -> None:
    assert next_victim([age("a", 1.0, waits=True), age("c", 1.0), age("b", 1.0)]) == "c"
