import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import ContextTooLong, ModelRefused
from shared.text.files import resolve_model
from shared.text.tokenizer import Tokenizer
from tests.text.conftest import DEMO

TEXTS = ["Once upon a time", " leading", "trailing ", "zwei\n\nZeilen\t", "naïve 🦔 日本語", "<|end|>inside<|end|>"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model's text files, to be changed."""
    for file in DEMO.glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}


@pytest.mark.parametrize("processor", [None, BOS_FIRST])
@pytest.mark.parametrize("bos", [True, False])
async def test_token_ids_equal_those_of_transformers(model: Path, processor: object, bos: bool) -> None:
    from transformers import AutoTokenizer

    change(model / "tokenizer.json", post_processor=processor)
    change(model / "tokenizer_config.json", add_bos_token=bos)
    theirs = AutoTokenizer.from_pretrained(model)
    ours = Tokenizer(model)
    for text in TEXTS:
        assert await ours.encode(text) == theirs(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert await ours.encode_chat(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_facts_of_the_demo_model(tokenizer: Tokenizer) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert tokenizer.vocab_size == config["vocab_size"]
    assert tokenizer.max_model_len == config["max_position_embeddings"]
    assert set(tokenizer.eos_token_ids) == set(config["eos_token_id"])
    assert tokenizer.vocabulary.is_byte_level


def test_end_tokens_are_those_of_all_files(model: Path) -> None:
    end = 4  # eos_token of tokenizer_config.json
    change(model / "generation_config.json", eos_token_id=7)
    change(model / "config.json", eos_token_id=[8, 9])
    assert Tokenizer(model).eos_token_ids == (7, 8, 9, end)
    (model / "generation_config.json").unlink()
    assert Tokenizer(model).eos_token_ids == (8, 9, end)
    change(model / "config.json", eos_token_id=None)
    assert Tokenizer(model).eos_token_ids == (end,)
    change(model / "tokenizer_config.json", eos_token="no token of this vocabulary")
    assert Tokenizer(model).eos_token_ids == ()


def test_end_tokens_that_cannot_be_generated_are_dropped_with_a_warning(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(model / "config.json", eos_token_id=None)
    change(model / "generation_config.json", eos_token_id=[0, 4096, 151_645, -1])
    assert Tokenizer(model).eos_token_ids == (0, 4)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "[4096, 151645, -1]" in record.getMessage()


def test_a_nested_text_config_is_read(model: Path) -> None:
    (model / "config.json").write_text('{"text_config": {"max_position_embeddings": 77, "vocab_size": 4096}}')
    change(model / "tokenizer_config.json", model_max_length=10**30)
    assert Tokenizer(model).max_model_len == 77


def test_sampling_defaults_are_read_and_checked(model: Path) -> None:
    change(model / "generation_config.json", temperature=0.6, top_k=20)
    assert Tokenizer(model).sampling_defaults.model_dump(exclude_none=True) == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_of_the_model_may_be_off(model: Path, top_k: int) -> None:
    change(model / "generation_config.json", top_k=top_k)
    assert Tokenizer(model).sampling_defaults.top_k == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_k", -2), ("top_k", "all"), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2)],
)
def test_sampling_defaults_out_of_range_reject_the_model(model: Path, name: str, value: object) -> None:
    change(model / "generation_config.json", **{name: value})
    with pytest.raises(ModelRefused, match=f"generation_config.json: {name} is {value!r}"):
        Tokenizer(model)


def test_what_is_wrong_with_a_model_is_said(model: Path) -> None:
    with pytest.raises(ModelRefused, match="no such folder"):
        resolve_model("/no/such/folder")
    with pytest.raises(ModelRefused, match="neither a folder nor a hub id"):
        resolve_model("no such name!")
    (model / "config.json").write_text("{}")
    change(model / "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(ModelRefused, match="max_position_embeddings"):
        Tokenizer(model)
    (model / "config.json").write_text("{")
    with pytest.raises(ModelRefused, match=r"config.json is not JSON"):
        Tokenizer(model)
    (model / "tokenizer.json").write_text("{}")
    shutil.copy(DEMO / "config.json", model)
    with pytest.raises(ModelRefused, match="cannot be read as a tokenizer"):
        Tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelRefused, match=r"no tokenizer.json"):
        Tokenizer.load(str(model))


async def test_a_text_that_cannot_fit_is_rejected_before_it_is_tokenised(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextTooLong, match="characters"):
        await tokenizer.encode("a" * 1_000_000, max_tokens=100)
    with pytest.raises(ContextTooLong):
        await tokenizer.encode_chat([{"role": "user", "content": "a" * 1_000_000}], max_tokens=100)


async def test_tokenising_a_megabyte_does_not_stall_the_event_loop(tokenizer: Tokenizer) -> None:
    encoding = asyncio.create_task(tokenizer.encode("Once upon a time there was a fox. " * 30_000))
    began = last = time.perf_counter()
    stalls = []
    while not encoding.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        stalls.append(now - last)
        last = now
    assert max(stalls) < 0.25 * (time.perf_counter() - began) or max(stalls) < 0.05


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, shared.text.tokenizer as t; from pathlib import Path; t.Tokenizer(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEMO)], capture_output=True, text=True, check=True, cwd=DEMO.parents[1]
    )
    assert done.stdout.strip() == "[]"
