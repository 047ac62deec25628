"""Added tokens of tokenizer_config.json, compared with what transformers makes of the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelRefused
from shared.text.tokenizer import Tokenizer
from tests.text.conftest import DEMO

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
MESSAGES = [{"role": "user", "content": "Hi <tool> there"}]
FIRST_FREE_ID = 4096


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demonstration model, whose special tokens are in the vocabulary of tokenizer.json but not added there."""
    for file in DEMO.glob("*.json"):
        shutil.copy(file, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        tokenizer["model"]["vocab"].setdefault(token["content"], token["id"])
    tokenizer["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


def configure(model: Path, **values: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def demo_decoder() -> dict[str, dict[str, Any]]:
    tokens = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    return {str(token.pop("id")): token for token in tokens}


async def assert_equals_transformers(model: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(model), AutoTokenizer.from_pretrained(model)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert await ours.encode_chat(MESSAGES) == expected
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    added = {token_id: token.special for token_id, token in theirs.added_tokens_decoder.items()}
    assert {token_id: ours.vocabulary.is_special(token_id) for token_id in added} == added


async def test_the_tokens_of_added_tokens_decoder_are_added(model: Path) -> None:
    configure(model, added_tokens_decoder=demo_decoder(), additional_special_tokens=[])
    tokenizer = Tokenizer(model)
    token_ids = await tokenizer.encode_chat(MESSAGES)
    assert token_ids[0] == 2
    assert {3, 4} < set(token_ids)
    assert token_ids == await Tokenizer(DEMO).encode_chat(MESSAGES)
    assert tokenizer.vocabulary.is_special(2)
    await assert_equals_transformers(model)


async def test_new_tokens_and_tokens_that_are_not_special_are_added(model: Path) -> None:
    decoder = demo_decoder() | {
        str(FIRST_FREE_ID): {"content": "<tool>", "special": False, **FLAGS},
        str(FIRST_FREE_ID + 1): {"content": "<new>", "special": True, **FLAGS},
    }
    configure(model, added_tokens_decoder=decoder)
    tokenizer = Tokenizer(model)
    assert FIRST_FREE_ID in await tokenizer.encode_chat(MESSAGES)
    assert not tokenizer.vocabulary.is_special(FIRST_FREE_ID)
    assert await tokenizer.encode("<new>") == [FIRST_FREE_ID + 1]
    await assert_equals_transformers(model)


async def test_named_special_tokens_of_the_vocabulary_are_special(model: Path) -> None:
    """Without added_tokens_decoder, too: eos_token and its kin are whole tokens of a prompt and give no text."""
    tokenizer = Tokenizer(model)
    assert await tokenizer.encode("<|end|>") == [4]
    assert tokenizer.vocabulary.is_special(4)
    assert tokenizer.detokenizer().feed(4) == ""
    await assert_equals_transformers(model)


def test_the_demonstration_model_is_as_before() -> None:
    assert Tokenizer(DEMO).vocabulary.is_special(5)
    assert Tokenizer(DEMO).vocab_size == FIRST_FREE_ID


@pytest.mark.parametrize(
    ("token_id", "content", "says"),
    [
        ("7", "<|end|>", "gives '<|end|>' the id 7, but tokenizer.json gives it the id 4"),
        ("4", "<new>", "gives '<new>' the id 4, but tokenizer.json gives that id to '<|end|>'"),
        ("5000", "<new>", "gives '<new>' the id 5000, but the next free id of tokenizer.json is 4096"),
    ],
)
def test_an_id_that_conflicts_with_tokenizer_json_rejects_the_model(
    model: Path, token_id: str, content: str, says: str
) -> None:
    configure(model, added_tokens_decoder={token_id: {"content": content, "special": True, **FLAGS}})
    with pytest.raises(ModelRefused) as raised:
        Tokenizer(model)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "decoder",
    [
        ["<new>"],
        {"first": {"content": "<new>"}},
        {"9": "<new>"},
        {"9": {"special": True}},
        {"-1": {"content": "<new>"}},
    ],
)
def test_a_malformed_added_tokens_decoder_rejects_the_model(model: Path, decoder: object) -> None:
    configure(model, added_tokens_decoder=decoder)
    with pytest.raises(ModelRefused, match="added_tokens_decoder"):
        Tokenizer(model)
