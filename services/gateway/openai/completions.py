"""/v1/completions: prompts in, the text that follows each out."""

import time
from collections.abc import Mapping, Sequence

from services.gateway.api import ApiContext, check_model
from shared.text.text_stream import TextDelta
from services.gateway.openai.body import parse
from services.gateway.openai.job import Collected, Job, Json, Usage, check_num_choices, make_job
from services.gateway.openai.logprobs import text_logprobs, token_label
from services.gateway.openai.schemas import CompletionRequest
from services.gateway.openai.unsupported import supported_fields
from services.gateway.sampling import DEFAULT_MAX_TOKENS


async def prepare_completions(api: ApiContext, request_id: str, body: Mapping[str, object]) -> Job:
    """The job that a request body asks for.

    Raises:
        RequestError: the request is refused.
    """
    request = parse(CompletionRequest, supported_fields(body))
    check_model(api, request.model)
    check_num_choices(len(request.prompt), request.n)
    max_model_len = api.core.max_model_len()
    prompts = [
        await api.tokenizer.encode(prompt, max_tokens=max_model_len) if isinstance(prompt, str) else prompt
        for prompt in request.prompt
    ]
    return make_job(
        api,
        request,
        request_id,
        prompts,
        TextWriter(api, request, request_id, prompts),
        param="prompt",
        max_tokens=request.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=request.logprobs,
    )


class TextWriter:
    """Writes `text_completion`, whose chunks have the same form as the whole.

    With `return_token_ids` each choice has `token_ids`, and it or its first chunk `prompt_token_ids`, as in vLLM.
    """

    def __init__(
        self, api: ApiContext, request: CompletionRequest, request_id: str, prompts: Sequence[list[int]]
    ) -> None:
        self._vocabulary = api.tokenizer.vocabulary
        self._has_logprobs = request.logprobs is not None
        self._includes_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._returns_ids = bool(request.return_token_ids)
        self._prompts = prompts
        self._n = request.n or 1
        self._offsets: dict[int, int] = {}
        self._head: Json = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": api.served_model_name,
            "system_fingerprint": api.system_fingerprint,
        }

    def chunk(self, index: int, delta: TextDelta) -> Json:
        chunk: Json = {**self._head, "choices": [self._choice(index, delta.text, delta)]}
        if self._includes_usage:
            chunk["usage"] = None
        return chunk

    def last_chunk(self, usage: Usage) -> Json:
        return {**self._head, "choices": [], "usage": usage.json()}

    def whole(self, choices: Sequence[Collected], usage: Usage) -> Json:
        written = [self._choice(index, "".join(choice.text), choice) for index, choice in enumerate(choices)]
        return {**self._head, "choices": written, "usage": usage.json()}

    def _choice(self, index: int, text: str, given: TextDelta | Collected) -> Json:
        is_first = index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        choice: Json = {"index": index, "text": text, "logprobs": None, "finish_reason": given.finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = text_logprobs(self._vocabulary, given.token_ids, given.logprobs, offset)
            self._offsets[index] += sum(len(token_label(self._vocabulary, token)) for token in given.token_ids)
        if self._returns_ids:
            choice["token_ids"] = given.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompts[index // self._n]
        return choice
