"""The exact bytes behind each token id. Which text a sequence of tokens makes is the detokenizer's part."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

METASPACE = "\u2581"


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
        backend: the tokenizer.
        vocab_size: number of ids the model knows; some may have no token.
    """

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        kinds = set(_decoder_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else None))
        self.is_byte_level = kinds == {"ByteLevel"}
        """Whether a text is the bytes of its tokens joined, and nothing else."""
        self._has_byte_tokens = "ByteFallback" in kinds
        self.size = vocab_size

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the token's bytes, perhaps a part of a character; empty for an id without a token."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return _byte_level_bytes(token)
        if token_id in self._added:
            return token.encode()
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(METASPACE, " ").encode()


def max_chars_per_token(backend: Backend) -> int | None:
    """Returns how many characters of a prompt one token stands for at most, or None where no bound is certain.

    It is certain for byte-level BPE that keeps every character: no normalizer changes the text before, no part of it is
    removed, each byte has a token, and no added token takes in the white space around it. Elsewhere a token may stand
    for any number of characters: of white space that is merged, or of unknown characters in succession.
    """
    if backend.normalizer is not None or not isinstance(backend.model, BPE) or backend.pre_tokenizer is None:
        return None
    if not _keeps_bytes(json.loads(backend.pre_tokenizer.__getstate__())):
        return None
    vocabulary = backend.get_vocab()
    if not BYTE_OF_CHARACTER.keys() <= vocabulary.keys():
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    return max(map(len, vocabulary))


def _keeps_bytes(pre_tokenizer: dict[str, Any]) -> bool:
    """Returns whether the text is split without loss, and at last written as bytes."""
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = parts or [{"type": "none"}]
    return last["type"] == "ByteLevel" and all(
        part["type"] in ("ByteLevel", "Digits") or (part["type"] == "Split" and part["behavior"] != "Removed")
        for part in splits
    )


def _decoder_kinds(decoder: dict[str, object] | None) -> Iterator[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        parts = decoder["decoders"]
        assert isinstance(parts, list)
        for part in parts:
            yield from _decoder_kinds(part)
    else:
        yield str(decoder["type"])


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own byte, the other 68 bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    # An added token may have characters outside the alphabet; tokenizers then takes the whole token as it is.
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
