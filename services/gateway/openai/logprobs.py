"""Log probabilities in the forms of both endpoints."""

from collections.abc import Sequence

from services.gateway.openai.job import Json
from shared.messages.serving import TokenLogprobs
from shared.sampling import LEAST_LOGPROB
from shared.text.vocabulary import Vocabulary


def chat_logprobs(vocabulary: Vocabulary, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json:
    """`choices[].logprobs` of a chat completion, one item for each token."""
    return {
        "content": [
            {
                **_chat_item(vocabulary, token_id, item.logprob),
                "top_logprobs": [_chat_item(vocabulary, top.token_id, top.logprob) for top in item.top],
            }
            for token_id, item in zip(token_ids, logprobs, strict=True)
        ],
        "refusal": None,
    }


def _chat_item(vocabulary: Vocabulary, token_id: int, logprob: float) -> Json:
    content = vocabulary.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(content),
    }


def text_logprobs(
    vocabulary: Vocabulary, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int
) -> Json:
    """`choices[].logprobs` of a text completion.

    Args:
        offset: characters of the choice's tokens before these.

    Returns:
        tokens, token_logprobs, top_logprobs (the likeliest and the chosen token, by text) and text_offset, each with
        one item for each token.
    """
    tokens = [token_label(vocabulary, token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(item.logprob, LEAST_LOGPROB) for item in logprobs],
        "top_logprobs": [
            {
                token: max(item.logprob, LEAST_LOGPROB),
                **{token_label(vocabulary, top.token_id): max(top.logprob, LEAST_LOGPROB) for top in item.top},
            }
            for token, item in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def token_label(vocabulary: Vocabulary, token_id: int) -> str:
    """A token as text; a part of a character as OpenAI writes it, `bytes:\\xe2\\x80`, so that parts stay distinct."""
    content = vocabulary.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
