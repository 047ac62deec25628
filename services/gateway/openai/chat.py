"""/v1/chat/completions: messages in, the assistant's next message out."""

import time
from collections.abc import Sequence

from services.gateway.api import ApiContext, check_model
from services.gateway.openai.completion import Completion, Json, check_num_choices, make_completion
from services.gateway.openai.middleware import RequestContext
from services.gateway.openai.schemas import ChatCompletionRequest, ChatMessage
from shared.messages.serving import TokenLogprobs
from shared.sampling import LEAST_LOGPROB
from shared.text.text_stream import TextDelta
from shared.text.vocabulary import Vocabulary


async def prepare_chat(api: ApiContext, context: RequestContext, fields: ChatCompletionRequest) -> Completion:
    """Makes the completion that a request asks for. Without max_tokens, it may fill the rest of the context.

    Raises:
        RequestError: the request is rejected.
    """
    check_model(api, fields.model)
    check_num_choices(1, fields.n)
    messages = [_template_message(message) for message in fields.messages]
    token_ids = await api.tokenizer.encode_chat(messages, max_tokens=api.core.max_model_len())
    return make_completion(
        api,
        context,
        fields,
        [token_ids],
        ChatWriter(api, context.request_id, fields, token_ids),
        param="messages",
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        default_max_tokens=None,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )


def _template_message(message: ChatMessage) -> dict[str, str]:
    fields = {"role": message.role, "content": message.content}
    return fields if message.name is None else fields | {"name": message.name}


class ChatWriter:
    """Writes `chat.completion` and `chat.completion.chunk`.

    With `return_token_ids`, as in vLLM, the answer or its first chunk has `prompt_token_ids`, each choice `token_ids`.
    """

    def __init__(
        self, api: ApiContext, request_id: str, fields: ChatCompletionRequest, prompt_token_ids: list[int]
    ) -> None:
        self._vocabulary = api.tokenizer.vocabulary
        self._has_logprobs = bool(fields.logprobs)
        self._includes_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._returns_ids = bool(fields.return_token_ids)
        self._prompt_token_ids = prompt_token_ids
        self._started: set[int] = set()
        self._head: Json = {
            "id": f"chatcmpl-{request_id}",
            "created": int(time.time()),
            "model": api.served_model_name,
            "system_fingerprint": api.system_fingerprint,
        }

    def chunk(self, index: int, delta: TextDelta) -> Json:
        content: Json = {"content": delta.text}
        chunk = self._chunk()
        if self._returns_ids and not self._started:
            chunk["prompt_token_ids"] = self._prompt_token_ids
        if index not in self._started:
            self._started.add(index)
            content = {"role": "assistant", "content": delta.text}
        chunk["choices"] = [{"index": index, "delta": content, **self._choice(delta)}]
        if self._includes_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._chunk(), "choices": [], "usage": usage}

    def whole(self, choices: Sequence[TextDelta], usage: Json) -> Json:
        answer: Json = {"object": "chat.completion", **self._head}
        answer["choices"] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                **self._choice(choice),
            }
            for index, choice in enumerate(choices)
        ]
        answer["usage"] = usage
        if self._returns_ids:
            answer["prompt_token_ids"] = self._prompt_token_ids
        return answer

    def _chunk(self) -> Json:
        return {"object": "chat.completion.chunk", **self._head}

    def _choice(self, given: TextDelta) -> Json:
        choice: Json = {"logprobs": None, "finish_reason": given.finish_reason}
        if self._has_logprobs:
            choice["logprobs"] = chat_logprobs(self._vocabulary, given.token_ids, given.logprobs)
        if self._returns_ids:
            choice["token_ids"] = given.token_ids
        return choice


def chat_logprobs(vocabulary: Vocabulary, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Json:
    """Returns `choices[].logprobs`, one item for each token."""
    content = [
        {
            **_logprob(vocabulary, token_id, item.logprob),
            "top_logprobs": [_logprob(vocabulary, top.token_id, top.logprob) for top in item.top],
        }
        for token_id, item in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _logprob(vocabulary: Vocabulary, token_id: int, logprob: float) -> Json:
    content = vocabulary.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(content),
    }
