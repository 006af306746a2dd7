"""Sizes that published checkpoints have in their config.json: for `unmask check`, which downloads nothing.

Source: each hub id's config.json, for LLaDA-MoE, LLaDA2.0-flash, Fast-dLLM v2 and A2D descriptions of it by others
(reference/models.md sections 1-9). Loading always reads the folder's own file.
"""

from __future__ import annotations

from typing import Any

_LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "activation_type": "silu",
}
_QWEN: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_DREAM = _QWEN | {
    "architectures": ["DreamModel"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def _sdar(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return _QWEN | {
        "architectures": ["SDARForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "block_size": 4,
    }


_LLADA2_MINI = _QWEN | {
    "architectures": ["LLaDA2MoeModelLM"],
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 6e5,
    "vocab_size": 157184,
}
_LLADA2_FLASH = _LLADA2_MINI | {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
}
_LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "expert_intermediate_size": 1024,
    "vocab_size": 157184,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN3_30B: dict[str, Any] = _QWEN | {
    "hidden_size": 2048,
    "intermediate_size": 6144,  # of dense layers, which it does not have
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
_SDAR_MOE = _QWEN3_30B | {"architectures": ["SDARMoeForCausalLM"]}
_RND1 = _QWEN3_30B | {"architectures": ["RND1LM"], "max_position_embeddings": 40960}
_FAST_DLLM = _DREAM | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32}
_A2D: dict[str, Any] = _QWEN | {
    "model_type": "a2d-qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    name: config
    for names, config in (
        ("GSAI-ML/LLaDA-8B-Base GSAI-ML/LLaDA-8B-Instruct GSAI-ML/LLaDA-1.5", _LLADA),
        ("inclusionAI/LLaDA-MoE-7B-A1B-Base inclusionAI/LLaDA-MoE-7B-A1B-Instruct", _LLADA_MOE),
        ("inclusionAI/LLaDA2.0-mini inclusionAI/LLaDA2.1-mini", _LLADA2_MINI),
        ("inclusionAI/LLaDA2.0-flash inclusionAI/LLaDA2.1-flash", _LLADA2_FLASH),
        ("Dream-org/Dream-v0-Base-7B Dream-org/Dream-v0-Instruct-7B", _DREAM),
        ("Dream-org/Dream-Coder-v0-Base-7B Dream-org/Dream-Coder-v0-Instruct-7B", _DREAM),
        ("apple/DiffuCoder-7B-Base apple/DiffuCoder-7B-Instruct apple/DiffuCoder-7B-cpGRPO", _DREAM),
        ("JetLM/SDAR-1.7B-Chat", _sdar(2048, 6144, 28, 16)),
        ("JetLM/SDAR-4B-Chat Gen-Verse/TraDo-4B-Instruct", _sdar(2560, 9728, 36, 32)),
        ("JetLM/SDAR-8B-Chat Gen-Verse/TraDo-8B-Instruct Gen-Verse/TraDo-8B-Thinking", _sdar(4096, 12288, 36, 32)),
        ("JetLM/SDAR-30B-A3B-Chat JetLM/SDAR-30B-A3B-Sci", _SDAR_MOE),
        ("Efficient-Large-Model/Fast_dLLM_v2_7B", _FAST_DLLM),
        ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", _A2D),
        ("radicalnumerics/RND1-Base-0910", _RND1),
    )
    for name in names.split()
}
