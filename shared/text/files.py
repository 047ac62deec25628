"""Where a model's text files are: a local folder, or a snapshot from the Hugging Face hub. Never its weights."""

import json
from pathlib import Path
from typing import TypeAlias

from shared.errors import ModelRefused

TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHT_INDEXES = ("*.index.json", "*.safetensors.json", "onnx/*", "original/*")

JSONValue: TypeAlias = "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"
JSONObject: TypeAlias = "dict[str, JSONValue]"


def resolve_model(model: str) -> Path:
    """Returns the folder with the model's tokenizer and configuration.

    Args:
        model: a local folder, which never touches the network, or a hub id such as `Qwen/Qwen3-0.6B`.

    Raises:
        ModelRefused: there is no such folder or hub model, or it lacks a file that is needed.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ModelRefused(f"{model}: there is no such folder; give a folder with config.json and tokenizer.json.")
        folder = _download(model)
    if not (folder / "tokenizer.json").is_file():
        raise ModelRefused(
            f"{model}: there is no tokenizer.json in {folder}; convert the tokenizer once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return folder


def _download(model: str) -> Path:
    # Imported here: the hub's client costs 15 MB and half a second that a local folder need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(TEXT_FILES), ignore_patterns=list(WEIGHT_INDEXES)))
    except HFValidationError as error:
        raise ModelRefused(f"{model}: neither a folder nor a hub id; write a path or `organisation/name`.") from error
    except LocalEntryNotFoundError as error:
        raise ModelRefused(
            f"{model}: there is no such folder, and the hub cannot be reached; download the model first, or check "
            "the network and HF_HUB_OFFLINE."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelRefused(
            f"{model}: there is no such folder, and the hub rejects it ({error.__class__.__name__}); check the name, "
            "or set HF_TOKEN if the model is gated."
        ) from error


def read_text(path: Path) -> str | None:
    """Returns the file's text, or None if there is no such file.

    Raises:
        ModelRefused: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ModelRefused(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def read_object(path: Path) -> JSONObject:
    """Returns the JSON object in a file; an empty one if there is no such file.

    Raises:
        ModelRefused: it is not a JSON object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelRefused(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelRefused(f"{path} must contain a JSON object.")
    return content
