"""llama.cpp through llama-cpp-python. `python -m bench.peers.llama_cpp MODEL FOLDER PRECISION` converts a Llama.

llama.cpp leaves it to its caller which tokens a step computes: here prompts fill steps one after another, and then all
requests decode together.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from bench.peers.worker import Load, OnStep, Precision, serve

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}

F32, BF16 = 0, 30
"""Numbers that ggml has for types of KV; the Python package lacks names for some."""

Row = tuple[int, int, int, bool]
"""Request, position, token id, and whether a token is to follow it."""


class LlamaCpp:
    def __init__(self, asked: Load) -> None:
        import llama_cpp
        import numpy

        self._api, self._as_array = llama_cpp, numpy.ctypeslib.as_array
        self.version = version("llama-cpp-python")
        self._step_tokens = asked.step_tokens
        llama_cpp.llama_backend_init()
        file = str(converted_file(asked.converted, asked.precision)).encode()
        model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = asked.max_requests * (asked.max_length + 256)  # each request's part is rounded
        options.n_batch = options.n_ubatch = asked.step_tokens
        options.n_seq_max = asked.max_requests
        options.n_threads = options.n_threads_batch = asked.threads
        options.type_k = options.type_v = F32 if asked.precision == "float32" else BF16
        self._context = llama_cpp.llama_init_from_model(model, options)
        self._batch = llama_cpp.llama_batch_init(asked.step_tokens, 0, 1)

    def run(self, prompts: list[list[int]], room: int, on_step: OnStep) -> None:
        last: dict[int, int] = {}
        for rows in self._prefill(prompts):
            tokens = self._step(rows)
            last.update(tokens)
            enough = on_step(tokens)
        position = len(prompts[0])  # they are all of one length
        while not enough:
            tokens = self._step([(request, position, token_id, True) for request, token_id in last.items()])
            position += 1
            last.update(tokens)
            enough = on_step(tokens)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def _prefill(self, prompts: list[list[int]]) -> Iterator[list[Row]]:
        rows = [
            (request, position, token_id, position == len(prompt) - 1)
            for request, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        for start in range(0, len(rows), self._step_tokens):
            yield rows[start : start + self._step_tokens]

    def _step(self, rows: list[Row]) -> list[tuple[int, int]]:
        """Compute these tokens; the likeliest next one where one is to follow."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (request, position, token_id, follows) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token_id, position, follows
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, request
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [(row[0], self._likeliest(index)) for index, row in enumerate(rows) if row[3]]

    def _likeliest(self, index: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, index)
        return int(self._as_array(logits, (self._num_vocab,)).argmax())


def converted_file(converted: str, precision: Precision) -> Path:
    return Path(converted) / f"llama-cpp-{precision}.gguf"


def convert(model: str, converted: str, precision: Precision) -> None:
    """Write the weights of a Llama as GGUF, without a tokenizer, if that has not been done."""
    import gguf
    from safetensors.numpy import load_file

    file = converted_file(converted, precision)
    if file.exists():
        return
    config = json.loads((Path(model) / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"{config['model_type']} models are not converted here, only llama")
    num_layers, num_heads, num_kv_heads = (
        config[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    weight_type = gguf.GGMLQuantizationType[TYPES[precision]]
    for path in Path(model).glob("*.safetensors"):
        for name, weight in load_file(path).items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = num_heads if "q_proj" in name else num_kv_heads
                # rotary halves one behind the other in transformers, element by element in llama.cpp
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            kind = weight_type if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                names.get_name(name, (".weight",)), gguf.quants.quantize(weight.astype("float32"), kind), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert(*sys.argv[1:])
    else:
        serve(LlamaCpp)
