"""The latest decisions, with their reasons."""

from services.controller.decisions import KEPT, Decisions


def kept(decisions: Decisions) -> list[tuple[str, str, str, str]]:
    return [(one.group, one.what, one.why, one.outcome) for one in decisions.status()]


def test_a_decision_shows_at_once_and_its_outcome_later() -> None:
    decisions = Decisions()
    first = decisions.take("chat", "changes 1 from prefill to decode", "decode is short")
    decisions.take("code", "p1 leaves", "it is gone").end("done")
    assert kept(decisions) == [
        ("chat", "changes 1 from prefill to decode", "decode is short", ""),
        ("code", "p1 leaves", "it is gone", "done"),
    ]
    first.end("failed: p1 is gone")
    assert decisions.status()[0].outcome == "failed: p1 is gone"
    assert decisions.status()[0].at <= decisions.status()[1].at


def test_the_latest_are_kept() -> None:
    decisions = Decisions()
    for number in range(KEPT + 5):
        decisions.take("chat", f"number {number}", "why")
    assert [one.what for one in decisions.status()] == [f"number {number}" for number in range(5, KEPT + 5)]


def test_advice_that_is_given_again_is_one_decision_with_the_latest_reason() -> None:
    decisions = Decisions()
    for why in ("7 % more", "9 % more"):
        decisions.take("chat", "would change 1", why).outcome = "advised"
    assert kept(decisions) == [("chat", "would change 1", "9 % more", "advised")]
    decisions.take("code", "would change 1", "other group").outcome = "advised"
    decisions.take("code", "would change 2", "other change").outcome = "advised"
    decisions.take("chat", "would change 1", "again").outcome = "advised"
    assert len(decisions.status()) == 4


def test_what_was_carried_out_twice_is_two_decisions() -> None:
    decisions = Decisions()
    for _ in range(2):
        decisions.take("chat", "p1 leaves", "it is gone").end("done")
    decisions.take("chat", "p1 leaves", "it is gone")
    assert len(decisions.status()) == 3
