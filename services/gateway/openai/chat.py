"""/v1/chat/completions: messages in, the assistant's next message out."""

import time
from collections.abc import Mapping, Sequence

from services.gateway.api import ApiContext, check_model
from shared.text.text_stream import TextDelta
from services.gateway.openai.body import parse
from services.gateway.openai.job import Collected, Job, Json, Usage, check_num_choices, make_job
from services.gateway.openai.logprobs import chat_logprobs
from services.gateway.openai.schemas import ChatCompletionRequest, ChatMessage
from services.gateway.openai.unsupported import supported_fields


async def prepare_chat(api: ApiContext, request_id: str, body: Mapping[str, object]) -> Job:
    """The job that a request body asks for. Without max_tokens, an answer may fill the rest of the context.

    Raises:
        RequestError: the request is refused.
    """
    request = parse(ChatCompletionRequest, supported_fields(body))
    check_model(api, request.model)
    check_num_choices(1, request.n)
    messages = [_template_message(message) for message in request.messages]
    token_ids = await api.tokenizer.encode_chat(messages, max_tokens=api.core.max_model_len())
    return make_job(
        api,
        request,
        request_id,
        [token_ids],
        ChatWriter(api, request, request_id, token_ids),
        param="messages",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        default_max_tokens=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _template_message(message: ChatMessage) -> dict[str, str]:
    fields = {"role": message.role, "content": message.content}
    return fields if message.name is None else fields | {"name": message.name}


class ChatWriter:
    """Writes `chat.completion` and `chat.completion.chunk`.

    With `return_token_ids`, as in vLLM, the answer or its first chunk has `prompt_token_ids`, each choice `token_ids`.
    """

    def __init__(
        self, api: ApiContext, request: ChatCompletionRequest, request_id: str, prompt_token_ids: list[int]
    ) -> None:
        self._vocabulary = api.tokenizer.vocabulary
        self._has_logprobs = bool(request.logprobs)
        self._includes_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._returns_ids = bool(request.return_token_ids)
        self._prompt_token_ids = prompt_token_ids
        self._begun: set[int] = set()
        self._head: Json = {
            "id": f"chatcmpl-{request_id}",
            "created": int(time.time()),
            "model": api.served_model_name,
            "system_fingerprint": api.system_fingerprint,
        }

    def chunk(self, index: int, delta: TextDelta) -> Json:
        content: Json = {"content": delta.text}
        chunk = self._chunk()
        if self._returns_ids and not self._begun:
            chunk["prompt_token_ids"] = self._prompt_token_ids
        if index not in self._begun:
            self._begun.add(index)
            content = {"role": "assistant", "content": delta.text}
        chunk["choices"] = [{"index": index, "delta": content, **self._choice(delta)}]
        if self._includes_usage:
            chunk["usage"] = None
        return chunk

    def last_chunk(self, usage: Usage) -> Json:
        return {**self._chunk(), "choices": [], "usage": usage.json()}

    def whole(self, choices: Sequence[Collected], usage: Usage) -> Json:
        answer: Json = {"object": "chat.completion", **self._head}
        answer["choices"] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                **self._choice(choice),
            }
            for index, choice in enumerate(choices)
        ]
        answer["usage"] = usage.json()
        if self._returns_ids:
            answer["prompt_token_ids"] = self._prompt_token_ids
        return answer

    def _chunk(self) -> Json:
        return {"object": "chat.completion.chunk", **self._head}

    def _choice(self, given: TextDelta | Collected) -> Json:
        choice: Json = {"logprobs": None, "finish_reason": given.finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = chat_logprobs(self._vocabulary, given.token_ids, given.logprobs)
        if self._returns_ids:
            choice["token_ids"] = given.token_ids
        return choice
