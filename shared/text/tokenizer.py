"""A model's tokenizer, by the `tokenizers` library alone: text to tokens without blocking the event loop, and back."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from shared.errors import ContextTooLong, ModelRefused
from shared.text.chat_template import ChatTemplate, Message
from shared.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from shared.text.files import resolve_model
from shared.text.model_config import ModelConfig, SamplingDefaults
from shared.text.vocabulary import Vocabulary


class Tokenizer:
    """Prompts to token ids, token ids to text, and what the model's files say about both.

    Args:
        folder: holds tokenizer.json, config.json, and perhaps tokenizer_config.json and generation_config.json.

    Raises:
        ModelRefused: a file is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.read(folder)
        self._backend = _read_backend(folder)
        vocab_size = config.vocab_size or self._backend.get_vocab_size()
        self.vocabulary = Vocabulary(self._backend, vocab_size)
        self.chat_template = ChatTemplate.read(folder, config.special_tokens)
        self.max_model_len: int = config.max_model_len
        self.special_tokens: dict[str, str] = config.special_tokens
        self.sampling_defaults: SamplingDefaults = config.sampling_defaults
        self.eos_token_ids: tuple[int, ...] = config.eos_token_ids or self._eos_of_tokenizer()

    @classmethod
    def load(cls, model: str) -> "Tokenizer":
        """The tokenizer of a local folder or a hub id; see `resolve_model`."""
        return cls(resolve_model(model))

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.vocabulary.size

    async def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that transformers would add: those of tokenizer.json's
        post-processor, over which it does not let `add_bos_token` of tokenizer_config.json have a say either.

        Args:
            text: any length.
            max_tokens: refuse a text that cannot have as few tokens, before work is spent on it.

        Raises:
            ContextTooLong: it certainly has more than `max_tokens`. One that does not raise may have more, too.
        """
        self._refuse_too_long(text, max_tokens)
        # `encode` holds the GIL: 1 MB stalls the loop for 550 ms from a thread, too. `encode_batch_fast` gives it up:
        # 280 ms, with a largest stall of 7-12 ms while the ids become a list (4k vocabulary, one Zen 5 core).
        return await asyncio.to_thread(self._encode, text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> list[int]:
        """Token ids of the chat template's prompt for `messages`, whose special tokens are not added a second time.

        Raises:
            InvalidRequest: the template does not take these messages.
            ContextTooLong: as `encode`.
        """
        text = await asyncio.to_thread(self.chat_template.render, messages)
        self._refuse_too_long(text, max_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all tokens at once."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """A fresh detokenizer for one generation, whose text goes on where the prompt ends."""
        if self.vocabulary.is_byte_level:
            return ByteDetokenizer(self.vocabulary)
        return WindowDetokenizer(self._backend, prompt_token_ids)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _refuse_too_long(self, text: str, max_tokens: int | None) -> None:
        # A lower bound: no token stands for more characters than the longest of the vocabulary has.
        least = -(-len(text) // self.vocabulary.longest_token_chars)
        if max_tokens is not None and least > max_tokens:
            raise ContextTooLong(
                f"The prompt has {len(text)} characters, which is at least {least} tokens, but the model's context is "
                f"{max_tokens} tokens: shorten the prompt."
            )

    def _eos_of_tokenizer(self) -> tuple[int, ...]:
        token_id = self._backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return () if token_id is None else (token_id,)


def _read_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path))
    # The library raises bare Exceptions for whatever is wrong with the file.
    except Exception as error:
        raise ModelRefused(f"{path} cannot be read as a tokenizer: {error}.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend
