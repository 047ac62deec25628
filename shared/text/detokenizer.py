"""From tokens to text, one token at a time. Special tokens give no text.

`tokenizers.decoders.DecodeStream` is not used: it raises "Invalid prefix" in the middle of a generation when a byte
token turns an earlier character invalid, holds back all text while a model writes invalid UTF-8, and has no flush.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as Backend

from shared.text.vocabulary import Vocabulary

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """One generation's text. The joined results of all calls are the text of all tokens."""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """The end of the text: what was held back of an incomplete character, as U+FFFD."""


class ByteDetokenizer:
    """For byte-level tokenizers, whose text is the UTF-8 decoding of the joined bytes of their tokens.

    Holds back three bytes at most. Equal to the full decoding for any tokens, valid UTF-8 or not: Rust's lossy decoding
    and Python's `replace` both put one U+FFFD for each maximal invalid part (Unicode 15, section 3.9).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        if self._vocabulary.is_special(token_id):
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For all other tokenizers, whose spaces and byte tokens depend on what stands before them.

    Decodes a window that starts at the last tokens of what stands before, then at the last that gave text, and returns
    by how much it grew: equal to the full decoding unless byte tokens make invalid UTF-8, where the full decoding goes
    back on characters already out.
    """

    MAX_HELD_TOKENS = 8
    """Longer than any character in byte tokens: text that still ends in U+FFFD is then invalid, and goes out."""

    def __init__(self, backend: Backend, before: Sequence[int] = ()) -> None:
        self._backend = backend
        self._window = list(before[-self.MAX_HELD_TOKENS :])
        while self._window and backend.decode(self._window).startswith(REPLACEMENT):
            del self._window[0]  # not from the middle of a character
        self._num_given = len(self._window)
        self._given = backend.decode(self._window)

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._backend.decode(self._window)
        is_incomplete = text.endswith(REPLACEMENT) and len(self._window) - self._num_given < self.MAX_HELD_TOKENS
        return "" if is_incomplete else self._give(text)

    def flush(self) -> str:
        return self._give(self._backend.decode(self._window))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        if new:
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)
            self._given = self._backend.decode(self._window)
        return new
