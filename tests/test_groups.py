"""The groups file: what it may say, and the sentence for what it may not."""

import json
import re
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import SettingsInvalid
from shared.groups import (
    DAY_MIN,
    DEFAULT,
    GroupsFile,
    GroupSpec,
    PlanEntry,
    declared_name,
    default_groups,
    replica_name,
)
from shared.groups_file import read_groups

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "groups.yaml"


def read(file: Path, text: str) -> GroupsFile:
    file.write_text(text, encoding="utf-8")
    return read_groups(file)


def chat(lines: str) -> str:
    """A file with one group `chat` that has these lines, separated by commas."""
    return f"groups: [{{name: chat, {lines}}}]"


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def entry(start: str, end: str, replicas: int = 2) -> PlanEntry:
    return PlanEntry(start=start, end=end, replicas=replicas)


def test_the_example() -> None:
    found = read_groups(ROOT / "examples/groups.yaml")
    first, second, third = found.groups
    assert (first.name, first.scenario, first.prefill, first.decode) == ("chat", "chat", 1, 2)
    assert (first.ttft_s, first.tpot_s, first.share) == (2.0, 0.1, 2.0)
    assert (first.min_instances, first.max_instances, first.replica_instances) == (3, 8, 3)
    assert [(one.start, one.end, one.replicas) for one in first.plan] == [("07:00", "22:00", 2)]
    assert [(str(one), one.replicas) for one in second.plan] == [("22:30-05:00", 1), ("05:00-22:30", 0)]
    assert third == GroupSpec(name=DEFAULT)
    assert (found.control, found.automatic_scenarios) == ("auto", False)


def test_what_the_documentation_shows(file: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/groups.md").read_text(), re.DOTALL)
    assert [group.name for group in read(file, block).groups] == ["chat", "default"]


def test_a_group_needs_only_a_name_and_default_is_made(file: Path) -> None:
    found = read(file, "groups: [{name: chat}]")
    assert found.groups == (GroupSpec(name="chat", scenario="chat"), GroupSpec(name=DEFAULT, scenario=DEFAULT))
    assert found.groups[0].min_instances == 2
    assert (found.groups[0].ttft_s, found.groups[0].max_instances, found.groups[0].plan) == (None, None, ())


def test_without_a_file() -> None:
    found = default_groups(prefill=2, decode=3)
    assert found == GroupsFile(groups=(GroupSpec(name=DEFAULT, prefill=2, decode=3),))
    assert default_groups().groups[0].replica_instances == 2


def test_a_bare_off_is_no_boolean(file: Path) -> None:
    assert read(file, "groups: [{name: chat}]\ncontrol: off").control == "off"
    assert read(file, "groups: [{name: chat}]\ncontrol: advise").control == "advise"


def test_lines_that_groups_have_in_common_can_be_merged(file: Path) -> None:
    found = read(file, "groups:\n- &chat {name: chat, ttft_ms: 500}\n- {<<: *chat, name: code, decode: 2}")
    assert [(one.name, one.scenario, one.ttft_ms, one.decode) for one in found.groups[:2]] == [
        ("chat", "chat", 500, 1),
        ("code", "code", 500, 2),
    ]


def test_what_is_written_out_reads_back(file: Path) -> None:
    found = read_groups(ROOT / "examples/groups.yaml")
    assert read(file, found.model_dump_json(by_alias=True)) == found


def test_they_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        default_groups().groups[0].prefill = 2


@pytest.mark.parametrize(
    ("name", "number", "called"), [("chat", 1, "chat"), ("chat", 2, "chat--2"), ("a-", 3, "a---3")]
)
def test_names_of_replicas_and_back(name: str, number: int, called: str) -> None:
    assert replica_name(name, number) == called
    assert declared_name(called) == name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no mapping in it: begin with the line `groups:`"),
        ("- chat", "there is no mapping in it"),
        ("groups: [{name: chat", "it is not YAML: line 1, column 21: expected ',' or '}'"),
        ("groups: 2024-99-99", "it is not YAML: month must be in 1..12"),
        ("\x01", "it is not YAML: unacceptable character"),
        ("group: []", "`group` is no key of the groups file: did you mean groups?"),
        ("control: auto", "`groups` is missing: write a list of groups, each beginning with `- name:`"),
        ("groups:", "`groups: None` cannot be used: write a list of groups"),
        ("groups: []", "`groups` is empty: write a list of groups"),
        ("groups: {chat: {prefill: 1}}", "`groups: {'chat': {'prefill': 1}}` cannot be used: write a list of groups"),
        ("groups: [chat]", "group 1: `'chat'` cannot be used: write a list of groups"),
        ("groups: &all [*all]", "group 1: `[[...]]` cannot be used"),
        ("groups: [{name: a}]\ngroups: [{name: b}]", "line 2 has `groups` a second time: write it once"),
        ("groups:\n- name: a\n  share: 1\n  share: 2", "line 4 has `share` a second time: write it once"),
        ("groups:\n- name: a\n  on: 1", "line 3 has a key `on` that YAML takes for no word"),
        ("? [a]\n: 1", "line 1 has a key that YAML takes for no word"),
        ("groups: [{name: a}]\ncontrol: on", "`control: True` cannot be used: write auto, advise or off"),
        ("groups: [{name: a}]\ncontrol: maybe", "`control: 'maybe'` cannot be used: write auto, advise or off"),
        ("groups: [{name: a}]\nautomatic_scenarios: 1", "`automatic_scenarios: 1` cannot be used: write true or false"),
    ],
)
def test_a_file_that_cannot_be_meant(file: Path, text: str, sentence: str) -> None:
    assert_refused(file, text, sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("groups: [{name: a}, {prefill: 1}]", "group 2: `name` is missing: write at most 48 letters"),
        ("groups: [{nmae: a}]", "group 1: `nmae` is no key of a group: did you mean name?"),
        ("groups: [{name: a.b}]", "group 1: `name: 'a.b'` cannot be used: write at most 48 letters, digits, _ and -"),
        ("groups: [{name: ''}]", "group 1: `name: ''` cannot be used"),
        (f"groups: [{{name: {'a' * 49}}}]", "cannot be used: write at most 48 letters"),
        ("groups: [{name: no}]", "group 1: `name: False` cannot be used: .* in quotes if YAML"),
        ("groups: [{name: 7}]", "group 1: `name: 7` cannot be used: .* in quotes if YAML"),
        ("groups: [{name: a--2}]", "group 1: `name: a--2` has --, which stands before the number of a replica"),
        ("groups: [{name: a}, {name: a}]", "two groups have `name: a`: write another name for one of them"),
        ("groups: [{name: a}, {name: b, scenario: a}]", "groups `a` and `b` both have `scenario: a`: write one group"),
        (chat("scenario: default"), "group `chat` has `scenario: default`, .*: write another scenario"),
        (chat("scenario: a b"), "group `chat`: `scenario: 'a b'` cannot be used: write at most 48 letters"),
        (chat("prefil: 2"), "group `chat`: `prefil` is no key of a group: did you mean prefill?"),
        (chat("zebra: 2"), "group `chat`: `zebra` is no key of a group: write one of name, scenario, prefill"),
        (chat("prefill: 0"), "group `chat`: `prefill: 0` cannot be used: write a whole number, 1 or more, as a group"),
        (chat("decode: 1.5"), "group `chat`: `decode: 1.5` cannot be used: write a whole number, 1 or more"),
        (chat("decode: true"), "group `chat`: `decode: True` cannot be used"),
        (chat("ttft_ms: 0"), "group `chat`: `ttft_ms: 0` cannot be used: write milliseconds, more than 0"),
        (chat("ttft_ms: .nan"), "group `chat`: `ttft_ms: nan` cannot be used"),
        (chat("tpot_ms: 100ms"), "group `chat`: `tpot_ms: '100ms'` cannot be used"),
        (chat("tpot_ms: true"), "group `chat`: `tpot_ms: True` cannot be used"),
        (chat("share: 0"), "group `chat`: `share: 0` cannot be used: write a number more than 0"),
        (chat("min_instances: 1"), "group `chat`: `min_instances: 1` cannot be used: write a whole number, 2 or more"),
        (chat("max_instances: 1"), "group `chat`: `max_instances: 1` cannot be used: .* or leave it out for no bound"),
        (
            chat("min_instances: 4, max_instances: 3"),
            "group `chat`: `max_instances: 3` is less than `min_instances`, which is 4: write 4 or more",
        ),
        (
            chat("decode: 2, max_instances: 2"),
            "group `chat`: `max_instances: 2` is less than 1 prefill and 2 decode instances: write 3 or more",
        ),
        (
            chat("decode: 2, max_instances: 5, plan: [{from: '07:00', to: '22:00', replicas: 2}]"),
            "`max_instances: 5` is less than 1 prefill and 2 decode instances times 2 replicas: write 6 or more",
        ),
    ],
)
def test_a_group_that_cannot_be_meant(file: Path, text: str, sentence: str) -> None:
    assert_refused(file, text, sentence)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("{from: '07:00'}", "group `chat`: `plan: .* cannot be used: write a list of entries as {from:"),
        ("[7]", "group `chat`, entry 1 of `plan`: `7` cannot be used: write a list of entries"),
        ("[{from: '07:00', to: '08:00'}]", "entry 1 of `plan`: `replicas` is missing: write a whole number, 0 or more"),
        (
            "[{from: '7:00', to: '08:00', replicas: 1}]",
            "entry 1 of `plan`: `from: '7:00'` cannot be used: write a time",
        ),
        ("[{from: '24:00', to: '08:00', replicas: 1}]", "`from: '24:00'` cannot be used: .* to \"23:59\""),
        ("[{from: '07:00', to: '24:01', replicas: 1}]", "`to: '24:01'` cannot be used: .* to \"24:00\""),
        ("[{from: '07:00', to: '08:60', replicas: 1}]", "`to: '08:60'` cannot be used"),
        ("[{from: 22:00, to: '23:00', replicas: 1}]", "`from: 1320` cannot be used: .*a bare 22:00 for a number"),
        (
            "[{start: '07:00', to: '08:00', replicas: 1}]",
            "`start` is no key of an entry of a plan: write one of from, to",
        ),
        (
            "[{from: '07:00', to: '08:00', replica: 1}]",
            "`replica` is no key of an entry of a plan: did you mean replicas",
        ),
        (
            "[{from: '07:00', to: '08:00', replicas: -1}]",
            "`replicas: -1` cannot be used: write a whole number, 0 or more",
        ),
        (
            "[{from: '07:00', to: '07:00', replicas: 1}]",
            '`from` and `to` are both "07:00": write two times, or "00:00"',
        ),
        (
            "[{from: '20:00', to: '04:00', replicas: 1}, {from: '03:59', to: '05:00', replicas: 2}]",
            "group `chat`: `plan` has 20:00-04:00 and 03:59-05:00, which overlap: end one where the next begins",
        ),
    ],
)
def test_a_plan_that_cannot_be_meant(file: Path, plan: str, sentence: str) -> None:
    assert_refused(file, chat(f"plan: {plan}"), sentence)


def test_the_group_for_everything_else_is_always_there(file: Path) -> None:
    text = "groups: [{name: default, plan: [{from: '07:00', to: '08:00', replicas: 0}]}]"
    assert_refused(file, text, "group `default`: `plan` has an entry with `replicas: 0`, .*: write 1 or more")
    assert read(file, text.replace("default", "chat")).groups[0].plan[0].replicas == 0


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    for name, reason in {"none": "No such file", ".": "Is a directory", "bytes": "it is no text"}.items():
        with pytest.raises(SettingsInvalid, match=f"^{re.escape(str(tmp_path / name))}: .*{reason}.*: write"):
            read_groups(tmp_path / name)


def minutes_of(one: PlanEntry) -> set[int]:
    return {minute for minute in range(DAY_MIN) if one.holds(minute)}


starts = st.integers(0, DAY_MIN - 1)
ends = st.integers(0, DAY_MIN)


@settings(deadline=None)
@given(start=starts, end=ends)
def test_an_entry_holds_from_its_start_until_its_end(start: int, end: int) -> None:
    if start == end:
        return
    held = minutes_of(entry(clock(start), clock(end)))
    if start < end:
        assert held == set(range(start, end))
    else:
        assert held == set(range(DAY_MIN)) - set(range(end, start))


@settings(deadline=None)
@given(spans=st.tuples(starts, ends, starts, ends).filter(lambda four: four[0] != four[1] and four[2] != four[3]))
def test_entries_overlap_where_they_share_a_minute(spans: tuple[int, int, int, int]) -> None:
    one, other = entry(clock(spans[0]), clock(spans[1])), entry(clock(spans[2]), clock(spans[3]))
    shared = minutes_of(one) & minutes_of(other)
    assert one.overlaps(other) == other.overlaps(one) == bool(shared)


@settings(deadline=None)
@given(
    key=st.sampled_from([*GroupSpec.model_fields, "other"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["from", "to", "replicas", "name"]), inner),
        max_leaves=5,
    ),
)
def test_whatever_a_line_says_is_used_or_refused(key: str, value: object) -> None:
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"groups": [{"name": "chat", key: value}]}, file)
        file.flush()
        try:
            found = read_groups(file.name)
        except SettingsInvalid as refused:
            assert re.fullmatch(f"{re.escape(file.name)}: .+", str(refused))  # noqa: PT017
        else:
            assert DEFAULT in [group.name for group in found.groups]


def assert_refused(file: Path, text: str, sentence: str) -> None:
    """It is refused in one line that begins with the file and goes on with a regular expression."""
    with pytest.raises(SettingsInvalid) as refused:
        read(file, text)
    said = str(refused.value)
    assert said.startswith(f"{file}: ")
    assert "\n" not in said
    assert re.search(_literal_but_wildcards(sentence), said), said


def _literal_but_wildcards(sentence: str) -> str:
    return re.escape(sentence).replace(r"\.\*", ".*")
