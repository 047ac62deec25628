"""The model that is compared: a random Llama of 100 million parameters unless a folder is given."""

import json
from pathlib import Path


def make_model(folder: Path) -> str:
    """Write the random model to `folder`; the same weights every time."""
    import torch  # the driver needs it for nothing else
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def kv_bytes_per_token(model: str, element_size: int) -> int:
    """What the KV of a token takes, in a model whose layers are all alike."""
    config = json.loads((Path(model) / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    return 2 * config["num_hidden_layers"] * num_kv_heads * head_dim * element_size
