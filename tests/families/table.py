"""Every family the engine is tried with, as tiny models with random weights; and those it refuses, with the reason."""

from dataclasses import dataclass, field

from transformers import AutoConfig, PreTrainedConfig

VOCAB_SIZE = 503
WINDOW = 24
"""Of models with a sliding window: shorter than most prompts, and no multiple of a block."""
OMITTED = object()
"""Stands for a field that the configuration is to have no value for."""

Fields = dict[str, object]

_SMALL: Fields = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far apart logits, so that rounding does not change the likeliest token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DERIVED: Fields = {"head_dim": OMITTED}
_MHA: Fields = {"num_key_value_heads": 6}
_WINDOWS: Fields = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS: Fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS: Fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Fields = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
_LATENT: Fields = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
_SCALED: Fields = {"attention_multiplier": 0.25}
_GPT2: Fields = {"n_positions": 512, "n_inner": 128}
_GPTJ: Fields = {"num_attention_heads": 4, "rotary_dim": 8, "n_positions": 512}
_MAMBA: Fields = {"mamba_n_heads": 4, "mamba_d_head": 48, "mamba_d_state": 8}
_LINEAR: Fields = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def _rope(rope_type: str, **fields: object) -> Fields:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


@dataclass(slots=True, frozen=True)
class Family:
    """A tiny model of one family, or of one variant of it.

    Args:
        name: what people call it.
        model_type: of its config.json.
        features: what of it matters to the engine.
        fields: of its configuration, besides those that all have.
        reason: why it is refused, if it is.
    """

    name: str
    model_type: str
    features: str
    fields: Fields = field(default_factory=dict)
    reason: str | None = None

    def config(self) -> PreTrainedConfig:
        fields = {**_SMALL, **self.fields}
        return AutoConfig.for_model(
            self.model_type, **{name: value for name, value in fields.items() if value is not OMITTED}
        )


def _refused(name: str, model_type: str, features: str, reason: str, fields: Fields | None = None) -> Family:
    return Family(name, model_type, features, fields or {}, reason)


FAMILIES = [
    Family("AFMoE", "afmoe", "GQA, MoE, window", {**_WINDOWS, **_EXPERTS, "num_dense_layers": 1}),
    Family("Apertus", "apertus", "GQA, query and key norm"),
    Family("Arcee", "arcee", "GQA"),
    Family(
        "Aria", "aria_text", "GQA, MoE", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, **_DERIVED}
    ),
    Family("BioGPT", "biogpt", "MHA, learned positions", {"pad_token_id": 1, **_DERIVED}),
    Family("BitNet", "bitnet", "GQA", _DERIVED),
    Family("Cohere", "cohere", "GQA, query and key norm", {"use_qk_norm": True, "logit_scale": 0.5, **_DERIVED}),
    Family("Cohere 2", "cohere2", "GQA, window, layers without rope", {**_WINDOWS, "logit_scale": 0.5}),
    Family("Cohere 2 MoE", "cohere2_moe", "GQA, MoE, window", {**_WINDOWS, **_EXPERTS, "logit_scale": 0.5}),
    Family("CWM", "cwm", "GQA, window", {**_WINDOWS, "bos_token_id": 0, "eos_token_id": 0}),
    Family("DeepSeek-V2", "deepseek_v2", "MLA, MoE", {**_LATENT, **_ROUTED, "topk_method": "group_limited_greedy"}),
    Family("DeepSeek-V3", "deepseek_v3", "MLA, MoE", {**_LATENT, **_ROUTED}),
    Family("dots.llm1", "dots1", "GQA, MoE, query and key norm", {**_ROUTED, **_DERIVED}),
    Family("Ernie 4.5", "ernie4_5", "GQA"),
    Family(
        "Ernie 4.5 MoE",
        "ernie4_5_moe",
        "GQA, MoE",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_intermediate_size": 48,
            **_DERIVED,
        },
    ),
    Family("EXAONE 4", "exaone4", "GQA, window, layers without rope", {**_WINDOWS, **_DERIVED}),
    Family("EXAONE MoE", "exaone_moe", "GQA, MoE, window", {**_WINDOWS, **_EXPERTS, **_DERIVED}),
    Family("FlexOlmo", "flex_olmo", "GQA, MoE, query and key norm", {**_EXPERTS, **_DERIVED}),
    Family("Gemma", "gemma", "MQA", {"num_key_value_heads": 1}),
    Family(
        "Gemma 2",
        "gemma2",
        "GQA, window, soft cap",
        {**_WINDOWS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    ),
    Family("Gemma 3", "gemma3_text", "GQA, window, two ropes", _WINDOWS),
    Family(
        "Gemma 3 with vision, text only",
        "gemma3",
        "GQA, window, two ropes",
        {
            "text_config": {**_SMALL, **_WINDOWS},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        "GQA, window, KV shared by layers",
        {
            **_WINDOWS,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        "GQA, window, two head sizes, KV shared by layers",
        {
            **_WINDOWS,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Family("GLM", "glm", "GQA, partial rope"),
    Family("GLM-4", "glm4", "GQA, partial rope"),
    Family("GLM-4.5", "glm4_moe", "GQA, MoE, partial rope", {**_ROUTED, "use_qk_norm": True}),
    Family("GLM-4.7-Flash", "glm4_moe_lite", "MLA, MoE", {**_LATENT, **_ROUTED}),
    Family("GPT-2", "gpt2", "MHA, learned positions", _GPT2),
    Family("GPT-BigCode", "gpt_bigcode", "MQA, learned positions", _GPT2),
    Family("GPT-NeoX", "gpt_neox", "MHA, partial rope", _DERIVED),
    Family("gpt-oss", "gpt_oss", "GQA, MoE, window, sinks, YaRN", {**_WINDOWS, **_LOCAL_EXPERTS}),
    Family(
        "Granite",
        "granite",
        "GQA",
        {
            **_SCALED,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            **_DERIVED,
        },
    ),
    Family(
        "Granite 4 without Mamba",
        "granitemoehybrid",
        "GQA, MoE",
        {
            **_LOCAL_EXPERTS,
            **_MAMBA,
            **_SCALED,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 64,
            **_DERIVED,
        },
    ),
    Family("Granite MoE", "granitemoe", "GQA, MoE", {**_LOCAL_EXPERTS, **_SCALED, **_DERIVED}),
    Family(
        "Granite MoE, shared expert",
        "granitemoeshared",
        "GQA, MoE",
        {**_LOCAL_EXPERTS, **_SCALED, "shared_intermediate_size": 64, **_DERIVED},
    ),
    Family("Helium", "helium", "GQA"),
    Family("Hunyuan", "hunyuan_v1_dense", "GQA, query and key norm"),
    Family("Hunyuan MoE", "hunyuan_v1_moe", "GQA, MoE, query and key norm", {"num_experts": 4, "moe_topk": 2}),
    Family("HyperCLOVA X", "hyperclovax", "GQA"),
    Family("Jais 2", "jais2", "GQA"),
    Family("JetMoE", "jetmoe", "MoE in attention", {**_LOCAL_EXPERTS, "kv_channels": 16, **_DERIVED}),
    Family(
        "Kimi K2",
        "deepseek_v3",
        "MLA, MoE, YaRN",
        {
            **_LATENT,
            **_ROUTED,
            "n_group": 1,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                mscale=1.0,
                mscale_all_dim=1.0,
                beta_fast=1.0,
                beta_slow=1.0,
            ),
        },
    ),
    Family("Llama", "llama", "GQA"),
    Family("Llama, MHA", "llama", "MHA, tied embeddings", {**_MHA, "tie_word_embeddings": True}),
    Family("Llama, MQA", "llama", "MQA, biases", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    Family("Llama, dynamic NTK", "llama", "GQA, dynamic rope", _rope("dynamic", factor=2.0)),
    Family("Llama, linear rope", "llama", "GQA, linear rope", _rope("linear", factor=2.0)),
    Family("Llama, YaRN", "llama", "GQA, YaRN", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    Family(
        "Llama 3",
        "llama",
        "GQA, llama3 rope",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    Family(
        "LongCat-Flash",
        "longcat_flash",
        "MLA, MoE, two attentions per layer",
        {
            **_LATENT,
            "num_layers": 2,
            "num_hidden_layers": OMITTED,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 48,
        },
    ),
    Family(
        "MiMo-V2-Flash",
        "mimo_v2_flash",
        "GQA, MoE, window, sinks",
        {**_WINDOWS, **_ROUTED, "num_attention_heads": 8, "v_head_dim": 12},
    ),
    Family("MiniCPM3", "minicpm3", "MLA", _LATENT),
    Family("MiniMax-M2", "minimax_m2", "GQA, MoE, query and key norm", _LOCAL_EXPERTS),
    Family("Ministral", "ministral", "GQA, window", _WINDOWS),
    Family(
        "Ministral 3",
        "ministral3",
        "GQA, YaRN, queries scaled by position",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1),
    ),
    Family("Mistral", "mistral", "GQA, window", {"sliding_window": WINDOW}),
    Family("Mixtral", "mixtral", "GQA, MoE", _LOCAL_EXPERTS),
    Family("nanochat", "nanochat", "GQA, query and key norm", _DERIVED),
    Family("Nemotron", "nemotron", "GQA, partial rope"),
    Family("OLMo", "olmo", "GQA", {"clip_qkv": 1.0, **_DERIVED}),
    Family("OLMo 2", "olmo2", "GQA, query and key norm", _DERIVED),
    Family("OLMo 3", "olmo3", "GQA, window, query and key norm", {**_WINDOWS, **_DERIVED}),
    Family("OLMoE", "olmoe", "GQA, MoE, query and key norm", {**_EXPERTS, **_DERIVED}),
    Family(
        "OPT",
        "opt",
        "MHA, learned positions",
        {"ffn_dim": 128, "word_embed_proj_dim": 96, "pad_token_id": 1, **_DERIVED},
    ),
    Family("Persimmon", "persimmon", "MHA, partial rope, query and key norm", _DERIVED),
    Family("Phi", "phi", "MHA, partial rope", {**_MHA, **_DERIVED}),
    Family("Phi-3", "phi3", "GQA, window", {"sliding_window": WINDOW, **_DERIVED}),
    Family(
        "Phi-3, LongRoPE",
        "phi3",
        "GQA, longrope",
        {
            **_DERIVED,
            "original_max_position_embeddings": 96,
            **_rope(
                "longrope",
                short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[2.0 + 0.5 * i for i in range(8)],
                original_max_position_embeddings=96,
            ),
        },
    ),
    Family("Phi-3.5-MoE", "phimoe", "GQA, MoE", {**_LOCAL_EXPERTS, **_DERIVED}),
    Family("Qwen2", "qwen2", "GQA", _DERIVED),
    Family(
        "Qwen2, window",
        "qwen2",
        "GQA, window",
        {**_WINDOWS, "use_sliding_window": True, "max_window_layers": 2, **_DERIVED},
    ),
    Family("Qwen2-MoE", "qwen2_moe", "GQA, MoE", {**_EXPERTS, "shared_expert_intermediate_size": 64, **_DERIVED}),
    Family("Qwen3", "qwen3", "GQA, query and key norm"),
    Family("Qwen3-MoE", "qwen3_moe", "GQA, MoE, query and key norm", _EXPERTS),
    Family("Seed-OSS", "seed_oss", "GQA"),
    Family("SmolLM3", "smollm3", "GQA, layers without rope", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    Family("Solar Open", "solar_open", "GQA, MoE", _ROUTED),
    Family("StableLM", "stablelm", "GQA, partial rope", {"use_qkv_bias": True, **_DERIVED}),
    Family("StarCoder2", "starcoder2", "GQA, window", {"sliding_window": WINDOW, **_DERIVED}),
    Family("VaultGemma", "vaultgemma", "GQA, window, soft cap", {**_WINDOWS, "attn_logit_softcapping": 5.0}),
    Family("Youtu", "youtu", "MLA", _LATENT),
]

_LINEAR_LAYERS = "it has layers of type linear_attention, which the engine does not have"
_OWN_ATTENTION = "layers [0, 1] do not use transformers' attention interface, so their state would be lost"

REFUSED = [
    _refused("Bamba", "bamba", "Mamba 2 layers", _LINEAR_LAYERS, {**_MAMBA, "attn_layer_indices": [1], **_DERIVED}),
    _refused("Bloom", "bloom", "ALiBi", _OWN_ATTENTION, {"n_head": 6}),
    _refused("CodeGen", "codegen", "attention of its own", _OWN_ATTENTION, {**_GPTJ, **_DERIVED}),
    _refused(
        "DeepSeek-V3.2",
        "deepseek_v32",
        "sparse attention",
        "it has layers of type indexed_attention, which the engine does not have",
        {**_LATENT, **_ROUTED},
    ),
    _refused(
        "DiffLlama",
        "diffllama",
        "differential attention",
        "a DiffLlamaAttention does not say which layer it is, or attends twice",
    ),
    _refused("Doge", "doge", "dynamic mask", "layer 0 brings an attention mask of its own"),
    _refused(
        "Falcon",
        "falcon",
        "attention of its own",
        _OWN_ATTENTION,
        {"new_decoder_architecture": True, "num_kv_heads": 2, **_DERIVED},
    ),
    _refused(
        "Falcon-H1",
        "falcon_h1",
        "Mamba 2 and attention side by side",
        "it has layers of type hybrid, which the engine does not have",
        {"mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, **_DERIVED},
    ),
    _refused("GPT-J", "gptj", "attention of its own", _OWN_ATTENTION, {**_GPTJ, **_DERIVED}),
    _refused(
        "GPT-Neo",
        "gpt_neo",
        "attention of its own",
        _OWN_ATTENTION,
        {"num_layers": 2, "num_heads": 6, "attention_types": [[["global", "local"], 1]], **_DERIVED},
    ),
    _refused(
        "Granite 4 hybrid",
        "granitemoehybrid",
        "Mamba 2 layers",
        _LINEAR_LAYERS,
        {**_LOCAL_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"], **_DERIVED},
    ),
    _refused("Jamba", "jamba", "Mamba layers", _LINEAR_LAYERS, _DERIVED),
    _refused("Kimi Linear", "kimi_linear", "Kimi delta attention", _LINEAR_LAYERS, {}),
    _refused(
        "LFM2",
        "lfm2",
        "convolutions",
        "it has layers of type conv, which the engine does not have",
        {"layer_types": ["conv", "full_attention"], **_DERIVED},
    ),
    _refused(
        "Llama 4",
        "llama4_text",
        "chunked attention",
        "it has layers of type chunked_attention, which the engine does not have",
        {},
    ),
    _refused("Mamba", "mamba", "state space model", _LINEAR_LAYERS, {"state_size": 4, **_DERIVED}),
    _refused("Mamba 2", "mamba2", "state space model", _LINEAR_LAYERS, {"num_heads": 12, "state_size": 4}),
    _refused("MiniMax-01", "minimax", "lightning attention", _LINEAR_LAYERS, _LOCAL_EXPERTS),
    _refused("MPT", "mpt", "ALiBi", _OWN_ATTENTION, {"n_heads": 6, "n_layers": 2, **_DERIVED}),
    _refused("Qwen3-Next", "qwen3_next", "gated delta net", _LINEAR_LAYERS, {**_EXPERTS, **_LINEAR}),
    _refused("Qwen3.5", "qwen3_5_text", "gated delta net", _LINEAR_LAYERS, _LINEAR),
    _refused("RWKV", "rwkv", "recurrent", _OWN_ATTENTION, {"attention_hidden_size": 96, **_DERIVED}),
    _refused(
        "XGLM",
        "xglm",
        "attention of its own",
        _OWN_ATTENTION,
        {"num_layers": 2, "attention_heads": 6, "ffn_dim": 128, "pad_token_id": 1, **_DERIVED},
    ),
    _refused(
        "Zaya", "zaya", "convolutions in attention", "it has layers of type hybrid, which the engine does not have"
    ),
]
