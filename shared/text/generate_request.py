"""From a client's `GenerateRequest` to the tokens of its prompt and complete sampling parameters."""

from shared.errors import InvalidRequest
from shared.messages.generate_api import GenerateRequest
from shared.sampling import SamplingParams
from shared.text.sampling_fields import DEFAULT_MAX_TOKENS, check_prompt, sampling_params
from shared.text.tokenizer import Tokenizer


async def read_request(
    request: GenerateRequest, tokenizer: Tokenizer, max_model_len: int
) -> tuple[list[int], SamplingParams]:
    """Returns the prompt's tokens and complete sampling parameters. Tokenises in a thread.

    Raises:
        InvalidRequest: among them ContextTooLong.
    """
    param, prompt_token_ids = await _read_prompt(request, tokenizer, max_model_len)
    check_prompt(prompt_token_ids, tokenizer, max_model_len, param)
    sampling = sampling_params(
        request,
        tokenizer=tokenizer,
        num_prompt_tokens=len(prompt_token_ids),
        max_model_len=max_model_len,
        max_tokens=request.max_tokens,
        default_max_tokens=None if request.messages is not None else DEFAULT_MAX_TOKENS,
        logprobs=request.logprobs,
    )
    return prompt_token_ids, sampling


async def _read_prompt(request: GenerateRequest, tokenizer: Tokenizer, max_model_len: int) -> tuple[str, list[int]]:
    """Returns the field with the prompt, and its tokens."""
    given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"Give exactly one of prompt, prompt_token_ids and messages, not {' and '.join(given) or 'none'}."
        )
    [param] = given
    if request.messages is not None:
        messages = [message.model_dump() for message in request.messages]
        return param, await tokenizer.encode_chat(messages, max_tokens=max_model_len)
    if request.prompt is not None:
        return param, await tokenizer.encode(request.prompt, max_tokens=max_model_len)
    assert request.prompt_token_ids is not None
    return param, request.prompt_token_ids
