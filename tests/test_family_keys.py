"""Real sizes on the meta device: every published tensor finds its place, and the bytes are the published total."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from unmask.policies import conversion
from unmask.policies.layout import CheckpointError, Layout
from unmask.policies.loading import stock_classes, stock_config
from unmask.policies.published import CONFIGS
from unmask.policies.resolving import find_layout

Shapes = dict[str, tuple[int, ...]]
HUB_IDS = (  # one a family and size; Open-dCoder and ModernBERT have the stock class's own names
    "GSAI-ML/LLaDA-8B-Instruct",
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
    "inclusionAI/LLaDA2.0-mini",
    "inclusionAI/LLaDA2.0-flash",
    "Dream-org/Dream-v0-Instruct-7B",
    "JetLM/SDAR-1.7B-Chat",
    "JetLM/SDAR-4B-Chat",
    "JetLM/SDAR-8B-Chat",
    "JetLM/SDAR-30B-A3B-Chat",
    "Efficient-Large-Model/Fast_dLLM_v2_7B",
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
    "radicalnumerics/RND1-Base-0910",
)
# Tensors and bytes in bfloat16 as published (models.md sections 1, 3-5).
PUBLISHED = {
    "GSAI-ML/LLaDA-8B-Instruct": (291, 16_031_162_368),
    "Dream-org/Dream-v0-Instruct-7B": (339, 15_231_233_024),
    "JetLM/SDAR-4B-Chat": (399, 8_822_848_512),
    "JetLM/SDAR-8B-Chat": (399, 16_381_470_720),
    "inclusionAI/LLaDA2.0-mini": (14_813, 32_511_286_784),
}


def llada_keys(config: dict[str, Any]) -> Shapes:
    width, inner, rows = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
    square, wide = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (width, width)), (inner, width)
    block = square | {"attn_norm": (width,), "ff_norm": (width,), "ff_proj": wide, "up_proj": wide}
    block |= {"ff_out": (width, inner)}
    layers = range(config["n_layers"])
    shapes: Shapes = {f"model.transformer.blocks.{n}.{k}.weight": s for n in layers for k, s in block.items()}
    ends = {"wte": (rows, width), "ln_f": (width,), "ff_out": (rows, width)}
    return shapes | {f"model.transformer.{name}.weight": shape for name, shape in ends.items()}


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
    shapes: Shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
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


def layout_of(name: str) -> Layout:
    ambiguous = "a2d_bd3lm" if "bd3lm" in name else "a2d_mdlm"
    return find_layout(CONFIGS[name], ambiguous if name.startswith("dllm-hub/") else None)


def keys(layout: Layout, config: dict[str, Any]) -> Shapes:
    if layout.name in ("llada", "llada2"):
        return llada_keys(config) if layout.name == "llada" else llada2_keys(config)
    inner = config.get("moe_intermediate_size") or config.get("expert_intermediate_size")
    return qwen_keys(config, bias=layout.stock == "qwen2", inner=inner)


@pytest.mark.parametrize("name", HUB_IDS)
def test_every_published_tensor_is_used_once(name: str) -> None:
    layout = layout_of(name)
    shapes = keys(layout, CONFIGS[name])
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
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    state = dict(conversion.to_stock(layout, config, tensors()))
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    back = conversion.to_vendor(layout, config, state)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


@pytest.mark.parametrize("name", HUB_IDS)
def test_names_translate_both_ways(name: str) -> None:
    """One table a family, read from either end: no two names meet, and each comes back."""
    layout = layout_of(name)
    vendor = keys(layout, CONFIGS[name] | {"n_layers": 12, "num_hidden_layers": 2})
    stock = {layout.to_stock(key) for key in vendor}
    assert len(stock) == len(vendor)
    assert {layout.to_vendor(key) for key in stock} == set(vendor)
    if layout.names:
        changed = {key for key in vendor if layout.to_stock(key) != key}
        assert all(any(key.startswith(old.partition("*")[0]) for old, _ in layout.names) for key in changed)
        # Every pair of the table is needed.
        for pair in layout.names:
            without = Layout(name="?", stock="", fields=(), names=tuple(p for p in layout.names if p != pair))
            assert {without.to_stock(key) for key in vendor} != stock, pair


def test_a_pattern_fits_whole_words_and_numbers_only() -> None:
    layout = Layout("mine", "llama", (), names=(("back.*.x", "model.*.y.z"), ("out", "lm_head")))
    pairs = {"back.12.x": "model.12.y.z", "back.3.x.weight": "model.3.y.z.weight", "out.bias": "lm_head.bias"}
    assert {key: layout.to_stock(key) for key in pairs} == pairs
    assert {value: layout.to_vendor(value) for value in pairs.values()} == {v: k for k, v in pairs.items()}
    for other in ("back.a.x.weight", "back.3.xx.weight", "outer.weight", "more.out.weight", "backs.3.x"):
        assert layout.to_stock(other) == other


def sdar_moe(**changes: int) -> tuple[Layout, Any, dict[str, torch.Tensor]]:
    """Return layout, stock config and named experts of one layer with 12 experts, expert e filled with e."""
    vendor = CONFIGS["JetLM/SDAR-30B-A3B-Chat"] | {"num_experts": 12, "num_hidden_layers": 1} | changes
    layout = find_layout(vendor, None)
    named = {
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": torch.full((2, 3), float(expert))
        for expert in range(12)
        for part in ("gate", "up")
    }
    return layout, stock_config(layout, vendor), named


def test_experts_are_stacked_by_number_not_by_name() -> None:
    layout, config, named = sdar_moe()
    ((name, stacked),) = conversion.to_stock(layout, config, [(k, named[k]) for k in sorted(named)])
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert stacked[:, 0, 0].tolist() == list(range(12))


def test_experts_of_a_renamed_trunk_come_back() -> None:
    _, config, named = sdar_moe()
    layout = Layout("mine", "qwen3_moe", (), names=(("backbone", "model"),), experts=True)
    theirs = {key.replace("model.", "backbone.", 1): value for key, value in named.items()}
    state = dict(conversion.to_stock(layout, config, theirs.items()))
    assert state.keys() == {"model.layers.0.mlp.experts.gate_up_proj"}
    assert conversion.to_vendor(layout, config, state).keys() == theirs.keys()


def test_experts_that_are_missing_too_many_or_of_another_shape() -> None:
    layout, config, named = sdar_moe()
    one = "model.layers.0.mlp.experts.7.up_proj.weight"
    lacking = [(key, value) for key, value in named.items() if key != one]
    with pytest.raises(CheckpointError, match=f"1 experts' tensors are missing, first '{one}'; download it again"):
        list(conversion.to_stock(layout, config, lacking))
    with pytest.raises(CheckpointError, match=r"experts.11.gate_proj.weight': config.json says there are 11 experts"):
        list(conversion.to_stock(layout, sdar_moe(num_experts=11)[1], named.items()))
    with pytest.raises(CheckpointError, match=r"shape \(2, 4\), other experts \(2, 3\)"):
        list(conversion.to_stock(layout, config, (named | {one: torch.zeros(2, 4)}).items()))


def test_a_fused_projection_of_other_heads() -> None:
    vendor = CONFIGS["inclusionAI/LLaDA2.0-mini"] | {"num_hidden_layers": 1}
    layout = find_layout(vendor, None)
    fused = {"model.layers.0.attention.query_key_value.weight": torch.zeros(24 * 128 + 1, 2048, device="meta")}
    with pytest.raises(CheckpointError, match=r"query_key_value.weight' has 3073 rows, config.json's heads make 3072"):
        list(conversion.to_stock(layout, stock_config(layout, vendor), fused.items()))
