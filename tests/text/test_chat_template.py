import json
from pathlib import Path

import pytest

from shared.errors import InvalidRequest, ModelRefused
from shared.text.chat_template import ChatTemplate
from tests.text.conftest import DEMO

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": ' Be <b>kind</b> & "short".\n'}, {"role": "user", "content": "日本語 🦔"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
]

TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}",
    "{%- for m in messages %}\n    {%- if loop.index0 == 2 %}{% break %}{% endif %}\n"
    "{{ m | tojson(indent=2) }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content | tojson }}"
    "{% endfor %}{{ strftime_now('%Y') }}{% if tools is none %} no tools{% endif %}{{ undefined_name }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "  {% if true %}\n  {{ m.content }}\n  {% endif %}\n{% endif %}{% endfor %}",
]


@pytest.fixture(scope="module")
def theirs():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("source", [None, *TEMPLATES])
def test_renders_as_transformers_does(theirs, source: str | None, messages: list[dict[str, str]]) -> None:  # type: ignore[no-untyped-def]
    special = theirs.special_tokens_map
    ours = ChatTemplate.read(DEMO, special) if source is None else ChatTemplate(source, special)
    expected = theirs.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert ours.render(messages) == expected


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert ChatTemplate.read(tmp_path, {}).render(CHATS[0]) == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert ChatTemplate.read(tmp_path, {}).render(CHATS[0]) == "from the file"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[5].content }}", "does not take these messages"),
        ("{{ messages[0]['content'] + 1 }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
    ],
)
def test_what_the_template_does_not_take_is_the_clients_error(source: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        ChatTemplate(source, {}).render(CHATS[0])


def test_a_template_that_does_not_compile_refuses_the_model() -> None:
    with pytest.raises(ModelRefused, match="does not compile"):
        ChatTemplate("{% for %}", {})
