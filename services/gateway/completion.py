"""One choice's stream, from generated tokens to text: detokenising, stop strings, and the one end."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from services.gateway.api import FirstToken
from shared.errors import InstanceFailed
from shared.messages.serving import OutputToken, TokenLogprobs
from shared.sampling import FinishReason
from shared.text.detokenizer import Detokenizer
from shared.text.stop_strings import StopStrings


@dataclass(slots=True)
class TextDelta:
    """What one generated token adds.

    Attributes:
        text: new text; empty while a character or a possible stop string is incomplete.
        token_ids: the generated token.
        logprobs: one item for each of `token_ids` if the request asked for them, else empty.
        finish_reason: set in the last delta, and only there.
        num_cached_tokens: how many tokens of the prompt were cached; in the first delta, and only there.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None


async def complete(
    tokens: AsyncGenerator[OutputToken, None],
    *,
    detokenizer: Detokenizer,
    stop: Sequence[str] = (),
    min_tokens: int = 0,
) -> AsyncGenerator[TextDelta, None]:
    """Turn one choice's tokens into text; one delta for each token.

    The text of a token that ends the request with `stop` is dropped. A stop string is cut off with all that follows it,
    and ends the request; it counts only in the text of tokens after the first `min_tokens`.

    Args:
        tokens: is closed at the end, however that comes, which cancels what still runs for it.
        detokenizer: a fresh one.
        stop: stop strings, none of them empty.
        min_tokens: number of tokens whose text is not searched.

    Raises:
        RequestError: from `tokens`; or InstanceFailed if they end without a finish reason.
    """
    strings = StopStrings(stop)
    async with aclosing(tokens):
        async for token in tokens:
            text = "" if token.finish_reason == "stop" else detokenizer.feed(token.token_id)
            if token.finish_reason is not None:
                text += detokenizer.flush()
            if token.index >= min_tokens:
                text = strings.feed(text)
            finish_reason: FinishReason | None = token.finish_reason
            if strings.matched is not None:
                finish_reason = "stop"
            elif finish_reason is not None:
                text += strings.flush()
            if finish_reason is not None:
                # Before the client takes the last delta: it may be slow, and a slot is held until then.
                await tokens.aclose()
            logprobs = [] if token.logprobs is None else [token.logprobs]
            num_cached_tokens = token.num_cached_tokens if isinstance(token, FirstToken) else None
            yield TextDelta(text, [token.token_id], logprobs, finish_reason, num_cached_tokens)
            if finish_reason is not None:
                return
    raise InstanceFailed("The generation broke off without a finish reason; send the request again.")
