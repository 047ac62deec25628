from shared.messages.serving import OutputToken, TokenLogprobs
from shared.sampling import FinishReason
from shared.text.text_stream import TextDelta, TextStream
from shared.text.tokenizer import Tokenizer
from tests.text.conftest import DEMO

TOKENIZER = Tokenizer(DEMO)
END = TOKENIZER.eos_token_ids[0]


def ids(text: str) -> list[int]:
    return TOKENIZER._encode(text, add_special_tokens=False)


def output_tokens(token_ids: list[int], finish_reason: FinishReason | None) -> list[OutputToken]:
    last = len(token_ids) - 1
    return [
        OutputToken(
            request_id="r", index=index, token_id=token_id, finish_reason=finish_reason if index == last else None
        )
        for index, token_id in enumerate(token_ids)
    ]


def run(
    token_ids: list[int], finish_reason: FinishReason | None, stop: list[str] | None = None, min_tokens: int = 0
) -> list[TextDelta]:
    """The deltas up to the one with a finish reason, after which no token may be fed."""
    stream = TextStream(TOKENIZER.detokenizer(), stop=stop or [], min_tokens=min_tokens)
    deltas: list[TextDelta] = []
    for token in output_tokens(token_ids, finish_reason):
        deltas.append(stream.feed(token))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text(deltas: list[TextDelta]) -> str:
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    return "".join(delta.text for delta in deltas)


def test_the_deltas_join_to_the_text() -> None:
    deltas = run(ids("Once upon a 🦔"), "length")
    assert text(deltas) == "Once upon a 🦔"
    assert deltas[-1].finish_reason == "length"
    assert [token for delta in deltas for token in delta.token_ids] == ids("Once upon a 🦔")


def test_the_text_of_a_stop_token_is_dropped_and_its_id_kept() -> None:
    last = ids(" fox")[0]
    deltas = run([*ids("Once upon"), last], "stop")
    assert text(deltas) == "Once upon"
    assert deltas[-1].token_ids == [last]
    assert deltas[-1].finish_reason == "stop"


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    assert text(run(ids("a🦔")[:-1], "length")) == "a\ufffd"


def test_a_stop_string_over_token_borders_ends_the_request() -> None:
    token_ids = ids("Once upon a time there was a fox")
    deltas = run(token_ids, "length", ["time th", "never"])
    assert text(deltas) == "Once upon a "
    assert deltas[-1].finish_reason == "stop"
    assert len(deltas) < len(token_ids)


def test_what_began_like_a_stop_string_comes_out_at_the_end() -> None:
    deltas = run(ids("Once upon a"), "length", ["a time"])
    assert text(deltas) == "Once upon a"
    assert deltas[-1].finish_reason == "length"
    assert text(run([*ids("Once upon a"), END], "stop", ["a time"])) == "Once upon a"


def test_a_stop_string_counts_only_after_min_tokens() -> None:
    token_ids = ids("no no no no")
    deltas = run(token_ids, "length", ["no"], min_tokens=2)
    assert text(deltas) == TOKENIZER.decode(token_ids[:2]) + " "
    assert sum(len(delta.token_ids) for delta in deltas) == 3


def test_tokens_that_break_off_have_no_finish_reason() -> None:
    assert [delta.finish_reason for delta in run(ids("Once upon"), None)] == [None] * len(ids("Once upon"))


def test_log_probabilities_and_cached_tokens_stay_with_their_token() -> None:
    logprobs = TokenLogprobs(logprob=-0.5)
    first = OutputToken(request_id="r", index=0, token_id=ids("a")[0], logprobs=logprobs, num_cached_tokens=7)
    stream = TextStream(TOKENIZER.detokenizer())
    delta = stream.feed(first)
    assert (delta.logprobs, delta.num_cached_tokens) == ([logprobs], 7)
    delta = stream.feed(OutputToken(request_id="r", index=1, token_id=END, finish_reason="stop"))
    assert (delta.logprobs, delta.num_cached_tokens) == ([], None)
