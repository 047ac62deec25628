"""Whether a text can be rejected by its number of characters alone, for small tokenizers of several kinds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from shared.errors import ContextTooLong
from shared.text.tokenizer import Tokenizer
from shared.text.vocabulary import max_chars_per_token

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE = "Ġ"
MERGES = [("a", "b"), ("ab", "a"), ("aba", "b"), (SPACE, SPACE), (SPACE + SPACE, SPACE + SPACE)]


def byte_level(*, alphabet: list[str] = ALPHABET) -> Backend:
    tokens = [*alphabet, *(first + second for first, second in MERGES)]
    backend = Backend(models.BPE({token: number for number, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def split_by(behavior: str) -> Backend:
    backend = byte_level()
    split = pre_tokenizers.Split(Regex(r"\s+"), behavior)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def normalized(normalizer: normalizers.Normalizer) -> Backend:
    backend = byte_level()
    backend.normalizer = normalizer
    return backend


def with_added(token: AddedToken) -> Backend:
    backend = byte_level()
    backend.add_tokens([token])
    return backend


def without_some_bytes() -> Backend:
    return byte_level(alphabet=[character for character in ALPHABET if character != "z"])


def fusing_unknown() -> Backend:
    backend = Backend(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Fuse()
    return backend


def words() -> Backend:
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def metaspace() -> Backend:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -1.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


BOUNDED: list[Callable[[], Backend]] = [
    byte_level,
    lambda: split_by("isolated"),
    lambda: split_by("merged_with_next"),
    lambda: with_added(AddedToken("a long added token", normalized=False)),
]
UNBOUNDED: list[tuple[Callable[[], Backend], str]] = [
    (lambda: split_by("removed"), " " * 5000),
    (lambda: normalized(normalizers.Strip()), " " * 5000),
    (lambda: normalized(normalizers.Replace(Regex(r"\s+"), " ")), " " * 5000),
    (lambda: normalized(normalizers.StripAccents()), "\u0301" * 5000),
    (lambda: with_added(AddedToken("<mask>", lstrip=True)), " " * 5000 + "<mask>"),
    (lambda: with_added(AddedToken("<mask>", rstrip=True)), "<mask>" + " " * 5000),
    (without_some_bytes, "z" * 5000),
    (fusing_unknown, "z" * 5000),
    (words, "z" * 5000),
    (metaspace, "z" * 5000),
]


def tokenizer_of(backend: Backend, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    return Tokenizer(folder)


@pytest.mark.parametrize(("make", "text"), UNBOUNDED)
async def test_a_long_text_of_few_tokens_is_accepted(make: Callable[[], Backend], text: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(make(), tmp_path)
    assert len(await tokenizer.encode(text, max_tokens=100)) <= 2


@pytest.mark.parametrize("make", BOUNDED)
async def test_a_text_with_certainly_too_many_tokens_is_rejected(make: Callable[[], Backend], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(make(), tmp_path)
    with pytest.raises(ContextTooLong, match="5000 characters"):
        await tokenizer.encode("z" * 5000, max_tokens=100)


@given(st.sampled_from(BOUNDED), st.text(st.sampled_from("ab z\t\né🦔\u0301") | st.characters(codec="utf-8")))
def test_no_token_has_more_characters_than_the_bound(make: Callable[[], Backend], text: str) -> None:
    backend = make()
    bound = max_chars_per_token(backend)
    assert bound is not None
    assert len(text) <= bound * len(backend.encode(text).ids)


async def test_the_bound_counts_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    """An added token may have an id that config.json's vocab_size does not cover."""
    backend = with_added(AddedToken("x" * 500, normalized=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"max_position_embeddings": 100, "vocab_size": backend.get_vocab_size() - 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(await Tokenizer(tmp_path).encode("x" * 5000, max_tokens=100)) == 10
