"""Places of lost instances, and who takes them."""

from services.controller.policy.membership import Place
from services.controller.vacancies import NEWCOMER_S, VACANT_S, Vacancies

PREFILL = Place("default", "prefill")
DECODE = Place("default", "decode")
ELSEWHERE = Place("other", "decode")


def test_the_place_of_a_lost_instance_is_vacant_until_it_is_filled() -> None:
    vacancies = Vacancies()
    vacancies.vacate(PREFILL, 0.0)
    vacancies.vacate(DECODE, 1.0)
    assert vacancies.places == (PREFILL, DECODE)
    vacancies.fill(PREFILL, 2.0)
    assert vacancies.places == (DECODE,)


def test_a_successor_may_come_before_the_loss_is_noticed() -> None:
    """It need not be of the same role; but who took a vacant place succeeds nobody else."""
    vacancies = Vacancies()
    vacancies.fill(DECODE, 0.0)
    vacancies.vacate(ELSEWHERE, 1.0)
    vacancies.vacate(PREFILL, 1.0)
    assert vacancies.places == (ELSEWHERE,)
    vacancies.fill(ELSEWHERE, 2.0)
    vacancies.vacate(ELSEWHERE, 3.0)
    assert vacancies.places == (ELSEWHERE,)


def test_one_that_comes_back_takes_its_place_and_is_no_newcomer() -> None:
    vacancies = Vacancies()
    vacancies.vacate(PREFILL, 0.0)
    vacancies.come_back(PREFILL)
    assert vacancies.places == ()
    vacancies.come_back(PREFILL)
    vacancies.vacate(PREFILL, 1.0)
    assert vacancies.places == (PREFILL,)


def test_places_and_newcomers_are_kept_for_a_while() -> None:
    vacancies = Vacancies()
    vacancies.fill(DECODE, 0.0)
    vacancies.vacate(ELSEWHERE, 0.0)
    vacancies.forget_old(NEWCOMER_S + 1.0)
    assert vacancies.places == (ELSEWHERE,)
    vacancies.vacate(PREFILL, NEWCOMER_S + 1.0)  # nobody who came lately takes it
    assert vacancies.places == (ELSEWHERE, PREFILL)
    vacancies.forget_old(VACANT_S + 1.0)
    assert vacancies.places == (PREFILL,)
