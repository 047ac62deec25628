from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from shared.text.text_stream import TextDelta, complete
from shared.errors import InstanceFailed, Overloaded
from shared.messages.serving import FinishReason, OutputToken
from shared.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[2] / "models" / "demo")
END = TOKENIZER.eos_token_ids[0]


class Tokens:
    """A scripted stream of tokens that remembers whether it was closed."""

    def __init__(
        self, token_ids: list[int], finish_reason: FinishReason | None, error: Exception | None = None
    ) -> None:
        self._token_ids = token_ids
        self._finish_reason = finish_reason
        self._error = error
        self.num_given = 0
        self.is_closed = False

    async def stream(self) -> AsyncGenerator[OutputToken, None]:
        try:
            for index, token_id in enumerate(self._token_ids):
                is_last = index == len(self._token_ids) - 1
                self.num_given += 1
                yield OutputToken(
                    request_id="r",
                    index=index,
                    token_id=token_id,
                    finish_reason=self._finish_reason if is_last else None,
                )
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


def ids(text: str) -> list[int]:
    return TOKENIZER._encode(text, add_special_tokens=False)


async def run(tokens: Tokens, stop: list[str] | None = None, min_tokens: int = 0) -> list[TextDelta]:
    deltas = complete(tokens.stream(), detokenizer=TOKENIZER.detokenizer(), stop=stop or [], min_tokens=min_tokens)
    return [delta async for delta in deltas]


def text(deltas: list[TextDelta]) -> str:
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    return "".join(delta.text for delta in deltas)


async def test_the_deltas_join_to_the_text() -> None:
    deltas = await run(Tokens(ids("Once upon a 🦔"), "length"))
    assert text(deltas) == "Once upon a 🦔"
    assert deltas[-1].finish_reason == "length"
    assert [token for delta in deltas for token in delta.token_ids] == ids("Once upon a 🦔")


async def test_the_text_of_a_stop_token_is_dropped_and_its_id_kept() -> None:
    last = ids(" fox")[0]
    deltas = await run(Tokens([*ids("Once upon"), last], "stop"))
    assert text(deltas) == "Once upon"
    assert deltas[-1].token_ids == [last]
    assert deltas[-1].finish_reason == "stop"


async def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    assert text(await run(Tokens(ids("a🦔")[:-1], "length"))) == "a\ufffd"


async def test_a_stop_string_over_token_borders_ends_the_request() -> None:
    tokens = Tokens(ids("Once upon a time there was a fox"), "length")
    deltas = await run(tokens, ["time th", "never"])
    assert text(deltas) == "Once upon a "
    assert deltas[-1].finish_reason == "stop"
    assert tokens.is_closed
    assert tokens.num_given < len(ids("Once upon a time there was a fox"))


async def test_the_tokens_are_closed_before_the_last_delta_is_out() -> None:
    tokens = Tokens(ids("Once upon a time"), "length")
    async for delta in complete(tokens.stream(), detokenizer=TOKENIZER.detokenizer(), stop=["upon"]):
        assert tokens.is_closed == (delta.finish_reason is not None)


async def test_what_began_like_a_stop_string_comes_out_at_the_end() -> None:
    deltas = await run(Tokens(ids("Once upon a"), "length"), ["a time"])
    assert text(deltas) == "Once upon a"
    assert deltas[-1].finish_reason == "length"
    deltas = await run(Tokens([*ids("Once upon a"), END], "stop"), ["a time"])
    assert text(deltas) == "Once upon a"


async def test_a_stop_string_counts_only_after_min_tokens() -> None:
    token_ids = ids("no no no no")
    deltas = await run(Tokens(token_ids, "length"), ["no"], min_tokens=2)
    assert text(deltas) == TOKENIZER.decode(token_ids[:2]) + " "
    assert sum(len(delta.token_ids) for delta in deltas) == 3


@pytest.mark.parametrize("error", [Overloaded("full"), None])
async def test_tokens_that_break_off_raise(error: Exception | None) -> None:
    with pytest.raises(type(error) if error else InstanceFailed):
        await run(Tokens(ids("Once"), None, error))


async def test_closing_the_text_closes_the_tokens() -> None:
    tokens = Tokens(ids("Once upon a time"), "length")
    deltas = complete(tokens.stream(), detokenizer=TOKENIZER.detokenizer())
    await anext(deltas)
    await deltas.aclose()
    assert tokens.is_closed
