"""Sizes that published checkpoints have in their config.json: for `unmask check`, which downloads nothing.

Source: the config.json of each hub id (models.md sections 1-5). Loading always reads the folder's own file.
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
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5"), _LLADA),
    **dict.fromkeys(("Dream-org/Dream-v0-Base-7B", "Dream-org/Dream-v0-Instruct-7B"), _DREAM),
    **dict.fromkeys(("Dream-org/Dream-Coder-v0-Instruct-7B", "apple/DiffuCoder-7B-Instruct"), _DREAM),
    "JetLM/SDAR-1.7B-Chat": _sdar(2048, 6144, 28, 16),
    **dict.fromkeys(("JetLM/SDAR-4B-Chat", "Gen-Verse/TraDo-4B-Instruct"), _sdar(2560, 9728, 36, 32)),
    **dict.fromkeys(("JetLM/SDAR-8B-Chat", "Gen-Verse/TraDo-8B-Instruct"), _sdar(4096, 12288, 36, 32)),
    **dict.fromkeys(("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-mini"), _LLADA2_MINI),
}
