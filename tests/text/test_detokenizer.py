from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from shared.text.detokenizer import Detokenizer, WindowDetokenizer
from shared.text.tokenizer import Tokenizer
from shared.text.vocabulary import Vocabulary
from tests.text.conftest import DEMO

TOKENIZER = Tokenizer(DEMO)


def metaspace_backend() -> Backend:
    """A tokenizer in the manner of sentencepiece's: spaces as U+2581, unknown characters as byte tokens."""
    words = ["\u2581", "\u2581a", "\u2581the", "a", "b", "c", "the", "é", "1"]
    vocab = {
        token: number for number, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    backend = Backend(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return backend


METASPACE = metaspace_backend()


def pieces(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.text())
def test_byte_level_deltas_join_to_the_text(text: str) -> None:
    token_ids = TOKENIZER._encode(text, add_special_tokens=False)
    assert "".join(pieces(TOKENIZER.detokenizer(), token_ids)) == TOKENIZER.decode(token_ids)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60))
def test_byte_level_deltas_join_to_the_full_decoding_of_any_tokens(token_ids: list[int]) -> None:
    assert "".join(pieces(TOKENIZER.detokenizer(), token_ids)) == TOKENIZER.decode(token_ids)


@given(st.text())
def test_metaspace_deltas_join_to_the_text(text: str) -> None:
    token_ids = METASPACE.encode(text).ids
    assert "".join(pieces(WindowDetokenizer(METASPACE), token_ids)) == METASPACE.decode(token_ids)


@given(st.text(min_size=1), st.text())
def test_metaspace_text_goes_on_where_the_prompt_ends(prompt: str, text: str) -> None:
    before = METASPACE.encode(prompt).ids
    token_ids = METASPACE.encode(f"x {text}").ids[1:]
    given = "".join(pieces(WindowDetokenizer(METASPACE, before), token_ids))
    assert METASPACE.decode(before) + given == METASPACE.decode(before + token_ids)


def test_metaspace_keeps_the_space_between_prompt_and_text() -> None:
    before, token_ids = METASPACE.encode("one").ids, METASPACE.encode("two").ids
    assert "".join(pieces(WindowDetokenizer(METASPACE, before), token_ids)) == " two"
    assert "".join(pieces(WindowDetokenizer(METASPACE), token_ids)) == "two"


@given(st.lists(st.integers(0, METASPACE.get_vocab_size() - 1), max_size=60))
def test_metaspace_takes_any_tokens_and_holds_back_few(token_ids: list[int]) -> None:
    detokenizer = WindowDetokenizer(METASPACE)
    for token_id in token_ids:
        detokenizer.feed(token_id)
        assert len(detokenizer._window) <= 2 * WindowDetokenizer.MAX_PENDING_TOKENS + len(token_ids)
    detokenizer.flush()


def test_a_character_over_several_tokens_comes_out_whole() -> None:
    token_ids = TOKENIZER._encode("🦔", add_special_tokens=False)
    assert len(token_ids) > 1
    given = pieces(TOKENIZER.detokenizer(), token_ids)
    assert given == [""] * (len(token_ids) - 1) + ["🦔", ""]


def test_an_incomplete_character_comes_out_at_the_end_as_a_replacement() -> None:
    token_ids = TOKENIZER._encode("🦔", add_special_tokens=False)[:-1]
    given = pieces(TOKENIZER.detokenizer(), token_ids)
    assert given[-1] == "\ufffd"
    assert not any(given[:-1])


def test_special_tokens_give_no_text() -> None:
    assert pieces(TOKENIZER.detokenizer(), [*TOKENIZER.eos_token_ids]) == ["", "", ""]


@given(st.text(min_size=1))
def test_the_bytes_of_tokens_join_to_the_bytes_of_the_text(text: str) -> None:
    vocabulary = TOKENIZER.vocabulary
    token_ids = TOKENIZER._encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.token_bytes, token_ids)).decode() == TOKENIZER.decode(
        token_ids, skip_special_tokens=False
    )


def test_the_bytes_of_metaspace_and_byte_tokens() -> None:
    vocabulary = Vocabulary(METASPACE, METASPACE.get_vocab_size() + 5)
    token = METASPACE.token_to_id
    assert vocabulary.token_bytes(token("\u2581the")) == b" the"
    assert vocabulary.token_bytes(token("<0xE2>")) == b"\xe2"
    assert vocabulary.token_bytes(token("<s>")) == b"<s>"
    assert vocabulary.token_bytes(METASPACE.get_vocab_size()) == b""
