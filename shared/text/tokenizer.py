"""A model's tokenizer, by the `tokenizers` library alone: text to tokens without blocking the event loop, and back."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from shared.errors import ContextTooLong, ModelRefused
from shared.text.added_tokens import add_configured_tokens
from shared.text.chat_template import ChatTemplate, Message
from shared.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from shared.text.files import resolve_model
from shared.text.model_config import ModelConfig, SamplingDefaults
from shared.text.vocabulary import Vocabulary, max_chars_per_token

LONG_TEXT_CHARS = 1_000_000
"""Longer texts are tokenised one at a time, because the tokenizer needs about 160 bytes of memory per character."""

log = logging.getLogger(__name__)


class Tokenizer:
    """Prompts to token ids, token ids to text, and what the model's files say about both.

    Args:
        folder: contains tokenizer.json, config.json, and perhaps tokenizer_config.json and generation_config.json.

    Raises:
        ModelRefused: a file is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.read(folder)
        self._backend = _read_backend(folder)
        vocab_size = config.vocab_size or self._backend.get_vocab_size()
        self.vocabulary = Vocabulary(self._backend, vocab_size)
        self._max_chars_per_token = max_chars_per_token(self._backend)
        self._long_text_lock = asyncio.Lock()
        self.chat_template = ChatTemplate.read(folder, config.special_tokens)
        self.max_model_len: int = config.max_model_len
        self.special_tokens: dict[str, str] = config.special_tokens
        self.sampling_defaults: SamplingDefaults = config.sampling_defaults
        self.eos_token_ids: tuple[int, ...] = self._eos_token_ids(config.eos_token_ids)

    @classmethod
    def load(cls, model: str) -> "Tokenizer":
        """Returns the tokenizer of a local folder or a hub id; see `resolve_model`."""
        return cls(resolve_model(model))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.vocabulary.size

    async def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that transformers would add: those of tokenizer.json's
        post-processor, which `add_bos_token` of tokenizer_config.json does not change there either.

        Args:
            text: any length.
            max_tokens: reject a text that cannot have as few tokens, where its length alone says so.

        Raises:
            ContextTooLong: it certainly has more than `max_tokens`. A text that does not raise may have more, too:
                the number of its tokens decides.
        """
        self._reject_too_long(text, max_tokens)
        return await self._encode_in_thread(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> list[int]:
        """Token ids of the chat template's prompt for `messages`, whose special tokens are not added a second time.

        Raises:
            InvalidRequest: the template does not take these messages.
            ContextTooLong: as `encode`.
        """
        text = await asyncio.to_thread(self.chat_template.render, messages)
        self._reject_too_long(text, max_tokens)
        return await self._encode_in_thread(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of all tokens at once."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """Returns a fresh detokenizer for one generation, whose text continues the prompt."""
        if self.vocabulary.is_byte_level:
            return ByteDetokenizer(self.vocabulary)
        return WindowDetokenizer(self._backend, prompt_token_ids)

    async def _encode_in_thread(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens=add_special_tokens)
        async with self._long_text_lock:
            return await asyncio.to_thread(self._encode, text, add_special_tokens=add_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode` holds the GIL: 1 MB stalls the loop for 550 ms from a thread, too. `encode_batch_fast` releases it:
        # 280 ms, with a largest stall of 7-12 ms while the ids become a list (4k vocabulary, one Zen 5 core).
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _reject_too_long(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is None or self._max_chars_per_token is None:
            return
        least = -(-len(text) // self._max_chars_per_token)
        if least > max_tokens:
            raise ContextTooLong(
                f"The prompt has {len(text)} characters, which is at least {least} tokens, but the model's context is "
                f"{max_tokens} tokens: shorten the prompt."
            )

    def _eos_token_ids(self, configured: Sequence[int]) -> tuple[int, ...]:
        """Returns the end tokens of all files that the model can generate at all."""
        own = self._backend.token_to_id(self.special_tokens.get("eos_token", ""))
        named = tuple(dict.fromkeys([*configured, *([] if own is None else [own])]))
        outside = [token_id for token_id in named if not 0 <= token_id < self.vocab_size]
        if outside:
            log.warning(
                "ignoring the end tokens %s of the model's files: its vocabulary has %d tokens, so they are never "
                "generated. If generations do not end, correct eos_token_id in generation_config.json.",
                outside,
                self.vocab_size,
            )
        return tuple(token_id for token_id in named if token_id not in outside)


def _read_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path))
    # The library raises bare Exceptions for whatever is wrong with the file.
    except Exception as error:
        raise ModelRefused(f"{path} cannot be read as a tokenizer: {error}.") from error
    backend.no_truncation()
    backend.no_padding()
    add_configured_tokens(backend, folder)
    return backend
