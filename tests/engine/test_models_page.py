from tests.families.report import DOCS, differences_of, page


def test_the_page_says_what_the_table_of_families_says() -> None:
    """`make test-families` writes it."""
    text = DOCS.read_text()
    assert page(differences_of(text)) == text
