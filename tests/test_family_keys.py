"""Real sizes on the meta device: every published tensor finds its place, and the bytes are the published total."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from unmask.policies import conversion
from unmask.policies.families import LAYOUTS
from unmask.policies.loading import stock_classes, stock_config

Shapes = dict[str, tuple[int, ...]]
QWEN = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
# Fields, tensor counts and byte totals (bfloat16) as published; models.md sections 3-5 and 9.
CONFIGS: dict[str, dict[str, Any]] = {
    "dream": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072},
    "sdar-1.7b": QWEN
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768},
    "sdar-4b": QWEN
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768},
    "sdar-8b": QWEN
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768},
    "sdar_moe": QWEN
    | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    | {"num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 32768}
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "llada_moe": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
    | {"num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "vocab_size": 157184}
    | {"rms_norm_eps": 1e-5, "rope_theta": 5e4, "max_position_embeddings": 8192, "hidden_act": "silu"},
    "llada2": QWEN
    | {"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 512, "num_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5}
    | {"rope_theta": 6e5, "vocab_size": 157184, "max_position_embeddings": 32768},
}
PUBLISHED = {  # tensors, bytes
    "dream": (339, 15_231_233_024),
    "sdar-4b": (399, 8_822_848_512),
    "sdar-8b": (399, 16_381_470_720),
    "llada2": (14_813, 32_511_286_784),
}


def attention(config: dict[str, Any], *, bias: bool = False, norm: bool = True) -> Shapes:
    width, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or width // heads
    shapes: Shapes = {"o_proj.weight": (width, heads * head)}
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        shapes[f"{name}_proj.weight"] = (count * head, width)
        if bias:
            shapes[f"{name}_proj.bias"] = (count * head,)
    return shapes | ({"q_norm.weight": (head,), "k_norm.weight": (head,)} if norm else {})


def mlp(width: int, inner: int) -> Shapes:
    return {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width), "down_proj.weight": (width, inner)}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def qwen_keys(config: dict[str, Any], *, bias: bool = False, inner: int | None = None) -> Shapes:
    """Return names and shapes of Qwen2, Qwen3 and Qwen3-MoE (transformers 4 names, one tensor an expert)."""
    width, rows = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= prefixed(at + "self_attn.", attention(config, bias=bias, norm=not bias))
        shapes |= {at + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        if inner is None:
            shapes |= prefixed(at + "mlp.", mlp(width, config["intermediate_size"]))
            continue
        shapes[at + "mlp.gate.weight"] = (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            shapes |= prefixed(f"{at}mlp.experts.{expert}.", mlp(width, inner))
    return shapes


def llada2_keys(config: dict[str, Any]) -> Shapes:
    width, rows, heads, groups = (
        config[name] for name in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    )
    shapes: Shapes = {"model.word_embeddings.weight": (rows, width), "lm_head.weight": (rows, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "attention.query_key_value.weight": ((heads + 2 * groups) * 128, width),
            at + "attention.dense.weight": (width, heads * 128),
            at + "attention.query_layernorm.weight": (128,),
            at + "attention.key_layernorm.weight": (128,),
            at + "input_layernorm.weight": (width,),
            at + "post_attention_layernorm.weight": (width,),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= prefixed(at + "mlp.", mlp(width, config["intermediate_size"]))
            continue
        shapes |= {at + "mlp.gate.weight": (256, width), at + "mlp.gate.expert_bias": (256,)}
        shapes |= prefixed(at + "mlp.shared_experts.", mlp(width, config["moe_intermediate_size"]))
        for expert in range(256):
            shapes |= prefixed(f"{at}mlp.experts.{expert}.", mlp(width, config["moe_intermediate_size"]))
    return shapes


def keys(name: str) -> Shapes:
    config = CONFIGS[name]
    if name == "llada2":
        return llada2_keys(config)
    inner = config.get("moe_intermediate_size") or config.get("expert_intermediate_size")
    return qwen_keys(config, bias=name == "dream", inner=inner)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_tensor_is_used_once(name: str) -> None:
    layout, shapes = LAYOUTS[name.split("-")[0]], keys(name)
    if name in PUBLISHED:
        numbers = [int(torch.Size(shape).numel()) for shape in shapes.values()]
        assert (len(shapes), 2 * sum(numbers)) == PUBLISHED[name]
    config = stock_config(layout, CONFIGS[name])
    with torch.device("meta"):
        model = stock_classes(layout, CONFIGS[name])[1](config)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        # In the order of published shards, where expert 10 comes before expert 2.
        for key in sorted(shapes):
            yield key, torch.empty(shapes[key], device="meta")

    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = dict(conversion.to_stock(layout, config, tensors()))
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    back = conversion.to_vendor(layout, config, state)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


def test_experts_are_stacked_by_number_not_by_name() -> None:
    config = stock_config(LAYOUTS["sdar_moe"], CONFIGS["sdar_moe"] | {"num_experts": 12, "num_hidden_layers": 1})
    named = {
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": torch.full((2, 3), float(expert))
        for expert in range(12)
        for part in ("gate", "up")
    }
    ((name, stacked),) = conversion.to_stock(LAYOUTS["sdar_moe"], config, [(k, named[k]) for k in sorted(named)])
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert stacked[:, 0, 0].tolist() == list(range(12))
