"""Retired words (docs/glossary.md) do not come back to the parts of the project that are free of them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("services/gateway", "shared/bus", "shared/messages", "shared/text")
PAGES = ("docs/protocol.md", "docs/architecture.md")
RETIRED = {
    "wish": r"wish(es|ed)?",
    "line of requests": r"(stands?|waits?|waiting|first) in (a |the |that )?line|(prefill|decode|waiting)[ _]lines?",
    "turn": r"(its|a|the|of) turn\b",
    "hint": r"hint(s|ed)?",
    "holder, held": r"(kv)?holders?|(is|are|be|was|were)? ?held(?! back)|holds?( their| its)? (kv|blocks?|requests?)",
    "room": r"room",
    "supply": r"supply|supplies",
    "let go": r"lets?[ _]go|letting go",
    "forget": r"forgets|forgotten|abandon(s|ed)?|give(s|n)?[ _]up|gave[ _]up|giving[ _]up",
    "parcel": r"parcels?|settles?",
    "pace, promise": r"pace|promises?|promised",
    "people words": r"crowd(ed)?|newcomers?|gifts?|givers?|founders?|whoever",
    "exchange, edge": r"exchanges?|the edge",
    "last words": r"last[ _]words",
    "refuse": r"refus(e|es|ed|al|als|ing)",
    "handover": r"hand-offs?|handovers?|hand[ _]overs?|hand(s|ed)?[ _]over",
    "nobody listens": r"nobody[ _]listens|nobody[ _]hears|nobody_heard",
    "fault of this program": r"fault of this program",
    "company": r"company",
}
"""Patterns of words, matched as words, in CamelCase and in snake_case."""
ALLOWED = ("ModelRefused", '"refusal"', "shared/kv/holder.py", "refused |")
"""Names of other parts of the project, of OpenAI's API, and of fields on the wire."""


def words_of(text: str) -> str:
    """The text with CamelCase and snake_case names taken apart."""
    for name in ALLOWED:
        text = text.replace(name, "")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", text).lower()


def files() -> list[Path]:
    found = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return [*found, *(ROOT / page for page in PAGES)]


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_it_uses_no_retired_word(file: Path) -> None:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = words_of(line)
        found += [
            f"{file.relative_to(ROOT)}:{number}: {name}: {line.strip()}"
            for name, pattern in RETIRED.items()
            if re.search(rf"\b(?:{pattern.replace('[ _]', ' ')})\b", words)
        ]
    assert not found, "\n".join(found)


def test_the_glossary_has_every_word() -> None:
    page = (ROOT / "docs/glossary.md").read_text()
    for word in ("wish", "hint", "holder", "room", "let go", "parcel", "promise", "refus", "hand-off", "exchange"):
        assert word in page
