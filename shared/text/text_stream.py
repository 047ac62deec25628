"""One generation's tokens to text: detokenising, stop strings, and the finish reason that the client sees."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        finish_reason: set in the last delta only.
        num_cached_tokens: tokens of the prompt that were cached; set in the first delta only.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None


class TextStream:
    """Turns one generation's tokens into text, one delta for each token.

    The text of a token that ends the request with `stop` is dropped. A stop string is cut off with all that follows it,
    and ends the request; it counts only in the text of tokens after the first `min_tokens`.

    Args:
        detokenizer: a fresh one.
        stop: stop strings, none of them empty.
        min_tokens: number of tokens whose text is not searched.
    """

    def __init__(self, detokenizer: Detokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens

    def feed(self, token: OutputToken) -> TextDelta:
        """Returns what the next token adds. After a delta with a finish reason, feed no more."""
        text = "" if token.finish_reason == "stop" else self._detokenizer.feed(token.token_id)
        if token.finish_reason is not None:
            text += self._detokenizer.flush()
        if token.index >= self._min_tokens:
            text = self._stop.feed(text)
        finish_reason: FinishReason | None = token.finish_reason
        if self._stop.matched is not None:
            finish_reason = "stop"
        elif finish_reason is not None:
            text += self._stop.flush()
        logprobs = [] if token.logprobs is None else [token.logprobs]
        return TextDelta(text, [token.token_id], logprobs, finish_reason, token.num_cached_tokens)
