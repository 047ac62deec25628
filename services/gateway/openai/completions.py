"""/v1/completions: prompts in, the text that follows each out."""

import time
from collections.abc import Sequence

from services.gateway.api import ApiContext, check_model
from services.gateway.openai.completion import Completion, Json, check_num_choices, make_completion
from services.gateway.openai.middleware import RequestContext
from services.gateway.openai.schemas import CompletionRequest
from shared.messages.serving import TokenLogprobs
from shared.sampling import LEAST_LOGPROB
from shared.text.sampling_fields import DEFAULT_MAX_TOKENS
from shared.text.text_stream import TextDelta
from shared.text.vocabulary import Vocabulary


async def prepare_completions(api: ApiContext, context: RequestContext, fields: CompletionRequest) -> Completion:
    """Makes the completion that a request asks for.

    Raises:
        RequestError: the request is rejected.
    """
    check_model(api, fields.model)
    check_num_choices(len(fields.prompt), fields.n)
    max_model_len = api.core.max_model_len()
    prompts = [
        await api.tokenizer.encode(prompt, max_tokens=max_model_len) if isinstance(prompt, str) else prompt
        for prompt in fields.prompt
    ]
    return make_completion(
        api,
        context,
        fields,
        prompts,
        TextWriter(api, context.request_id, fields, prompts),
        param="prompt",
        max_tokens=fields.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=fields.logprobs,
    )


class TextWriter:
    """Writes `text_completion`, whose chunks have the same form as the whole.

    With `return_token_ids` each choice has `token_ids`, and it or its first chunk `prompt_token_ids`, as in vLLM.
    """

    def __init__(
        self, api: ApiContext, request_id: str, fields: CompletionRequest, prompts: Sequence[list[int]]
    ) -> None:
        self._vocabulary = api.tokenizer.vocabulary
        self._has_logprobs = fields.logprobs is not None
        self._includes_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._returns_ids = bool(fields.return_token_ids)
        self._prompts = prompts
        self._n = fields.n or 1
        self._offsets: dict[int, int] = {}
        self._head: Json = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": api.served_model_name,
            "system_fingerprint": api.system_fingerprint,
        }

    def chunk(self, index: int, delta: TextDelta) -> Json:
        chunk: Json = {**self._head, "choices": [self._choice(index, delta)]}
        if self._includes_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[TextDelta], usage: Json) -> Json:
        written = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "choices": written, "usage": usage}

    def _choice(self, index: int, given: TextDelta) -> Json:
        is_first = index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        choice: Json = {"index": index, "text": given.text, "logprobs": None, "finish_reason": given.finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = text_logprobs(self._vocabulary, given.token_ids, given.logprobs, offset)
            self._offsets[index] += sum(len(token_label(self._vocabulary, token)) for token in given.token_ids)
        if self._returns_ids:
            choice["token_ids"] = given.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompts[index // self._n]
        return choice


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
    """Returns a token as text; part of a character as OpenAI writes it, `bytes:\\xe2\\x80`, so parts stay distinct."""
    content = vocabulary.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
