"""The exact bytes behind each token id. Which text a row of tokens makes is the detokenizer's part."""

import json
from collections.abc import Iterator

from tokenizers import Tokenizer as Backend

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
        self.longest_token_chars = max(len(backend.id_to_token(i) or "") for i in range(vocab_size))

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, perhaps a part of a character; empty for an id without a token."""
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
    # An added token may hold characters outside the alphabet; tokenizers then takes the whole token as it is.
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
