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
    """The text of one generation. The joined results of all calls are the text of all tokens."""

    def feed(self, token_id: int) -> str:
        """Returns the text that this token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """Returns the end of the text: the bytes of an incomplete character, as U+FFFD."""


class ByteDetokenizer:
    """For byte-level tokenizers, whose text is the UTF-8 decoding of the joined bytes of their tokens.

    It holds back three bytes at most. Its text equals the full decoding for any tokens, valid UTF-8 or not: Rust's
    lossy decoding and Python's `replace` both put one U+FFFD for each maximal invalid part (Unicode 15, section 3.9).
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
    """For all other tokenizers, whose spaces and byte tokens depend on the tokens before them.

    It decodes a window that starts at the last tokens of the prompt, later at the last tokens that completed text, and
    returns by how much the text grew. That equals the full decoding unless byte tokens make invalid UTF-8, where the
    full decoding changes characters that have been returned already.
    """

    MAX_PENDING_TOKENS = 8
    """Longer than any character in byte tokens: text that still ends in U+FFFD is then invalid, and is returned."""

    def __init__(self, backend: Backend, before: Sequence[int] = ()) -> None:
        self._backend = backend
        self._window = list(before[-self.MAX_PENDING_TOKENS :])
        while self._window and backend.decode(self._window).startswith(REPLACEMENT):
            del self._window[0]  # not from the middle of a character
        self._num_shown = len(self._window)
        self._shown = backend.decode(self._window)

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._backend.decode(self._window)
        is_incomplete = text.endswith(REPLACEMENT) and len(self._window) - self._num_shown < self.MAX_PENDING_TOKENS
        return "" if is_incomplete else self._show(text)

    def flush(self) -> str:
        return self._show(self._backend.decode(self._window))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown = self._backend.decode(self._window)
        return new
