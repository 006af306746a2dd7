"""Families of denoisers as data: how each published checkpoint folder maps onto a stock transformers class.

Sources: the config.json, tensor names and model cards of the checkpoints that a layout names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .layout import ATTENTION_TARGETS, Layout, same

LLAMA_FIELDS = same(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings initializer_range"
)
QWEN3_FIELDS = (*LLAMA_FIELDS, *same("head_dim attention_bias"))
QWEN3_MOE_FIELDS = (
    *QWEN3_FIELDS,
    *same("num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers"),
)
QWEN_REQUIRES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("use_sliding_window", (False, None)),
)
LLADA = Layout(
    name="llada",  # LLaDA-8B-Base, -Instruct, LLaDA-1.5; unmask:tiny
    stock="llama",
    architectures=("LLaDAModelLM",),
    fields=(
        ("vocab_size", ("embedding_size", "vocab_size")),
        ("hidden_size", ("d_model",)),
        ("intermediate_size", ("mlp_hidden_size",)),
        ("num_hidden_layers", ("n_layers",)),
        ("num_attention_heads", ("n_heads",)),
        ("num_key_value_heads", ("n_kv_heads", "n_heads")),
        ("max_position_embeddings", ("max_sequence_length",)),
        ("rms_norm_eps", ("rms_norm_eps",)),
        ("attention_bias", ("include_qkv_bias",)),
        ("mlp_bias", ("include_bias",)),
        ("tie_word_embeddings", ("weight_tying",)),
        ("hidden_act", ("activation_type",)),
        ("initializer_range", ("init_std",)),
    ),
    names=(
        ("model.transformer.blocks.*.attn_norm", "model.layers.*.input_layernorm"),
        ("model.transformer.blocks.*.q_proj", "model.layers.*.self_attn.q_proj"),
        ("model.transformer.blocks.*.k_proj", "model.layers.*.self_attn.k_proj"),
        ("model.transformer.blocks.*.v_proj", "model.layers.*.self_attn.v_proj"),
        ("model.transformer.blocks.*.attn_out", "model.layers.*.self_attn.o_proj"),
        ("model.transformer.blocks.*.ff_norm", "model.layers.*.post_attention_layernorm"),
        ("model.transformer.blocks.*.ff_proj", "model.layers.*.mlp.gate_proj"),
        ("model.transformer.blocks.*.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.transformer.blocks.*.ff_out", "model.layers.*.mlp.down_proj"),
        ("model.transformer.wte", "model.embed_tokens"),
        ("model.transformer.ln_f", "model.norm"),
        ("model.transformer.ff_out", "lm_head"),
    ),
    derive=lambda vendor: (
        {} if vendor.get("mlp_hidden_size") else {"intermediate_size": vendor["mlp_ratio"] * vendor["d_model"]}
    ),
    optional=frozenset({*Layout.optional, "mlp_bias", "intermediate_size"}),
    # <|eot_id|> ends a turn of the Instruct checkpoints; smaller vocabularies do not have it.
    turn_end_ids=(126348,),
    requires=(
        ("block_type", ("llama",)),
        ("layer_norm_type", ("rms",)),
        ("activation_type", ("silu",)),
        ("rope", (True,)),
        ("attention_layer_norm", (False,)),
        ("input_emb_norm", (False,)),
        ("scale_logits", (False,)),
        ("alibi", (False,)),
    ),
    template="llada",
)

LLADA_MOE = Layout(
    name="llada_moe",  # LLaDA-MoE-7B-A1B-Base, -Instruct; its model_type is "llada", as the dense family's
    stock="qwen3_moe",
    architectures=("LLaDAMoEModelLM",),
    model_types=("lladamoe",),
    fields=(
        *same("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"),
        *same("max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings initializer_range attention_bias"),
        *same("num_experts num_experts_per_tok"),
        ("intermediate_size", ("dense_intermediate_size", "expert_intermediate_size")),
        ("moe_intermediate_size", ("expert_intermediate_size",)),
    ),
    # The vendor never renormalises the chosen experts' weights, whatever its config says.
    constants=(("norm_topk_prob", False), ("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    derive=lambda vendor: {"head_dim": vendor["hidden_size"] // vendor["num_attention_heads"]},
    experts=True,
    requires=(
        ("qk_layernorm", (True,)),
        ("clip_qkv", (None,)),
        ("moe_router_score_function", ("softmax",)),
        ("moe_router_enable_expert_bias", (False, None)),
        ("shared_expert_intermediate_size", (None, 0)),
        ("partial_rotary_factor", (1, None)),
        ("router_num_group", (None, 0, 1)),
        ("routed_scaling_factor", (1, None)),
    ),
    published=(("mask_token_id", 156895),),
    turn_end_tokens=("<|role_end|>",),
    template="role",
    lora_targets=ATTENTION_TARGETS,
)

LLADA2 = Layout(
    name="llada2",  # LLaDA2.0 and 2.1, mini and flash
    stock="glm4_moe",
    architectures=("LLaDA2MoeModelLM",),
    model_types=("llada2_moe", "llada2_moe_veomni"),
    fields=(
        *QWEN3_FIELDS,
        *same("num_experts_per_tok moe_intermediate_size norm_topk_prob n_group topk_group routed_scaling_factor"),
        *same("first_k_dense_replace"),
        ("n_routed_experts", ("num_experts",)),
        ("n_shared_experts", ("num_shared_experts",)),
    ),
    # The vendor normalises queries and keys whatever use_qk_norm says.
    constants=(("use_qk_norm", True),),
    experts=True,
    fused_qkv=True,
    names=(
        ("model.word_embeddings", "model.embed_tokens"),
        ("model.layers.*.attention.query_key_value", "model.layers.*.self_attn.query_key_value"),
        ("model.layers.*.attention.dense", "model.layers.*.self_attn.o_proj"),
        ("model.layers.*.attention.query_layernorm", "model.layers.*.self_attn.q_norm"),
        ("model.layers.*.attention.key_layernorm", "model.layers.*.self_attn.k_norm"),
        ("model.layers.*.mlp.gate.expert_bias", "model.layers.*.mlp.gate.e_score_correction_bias"),
    ),
    requires=(
        *QWEN_REQUIRES,
        ("score_function", ("sigmoid",)),
        ("moe_router_enable_expert_bias", (True,)),
        ("use_bias", (False, None)),
        ("use_qkv_bias", (False, None)),
    ),
    attention="block_causal",
    published=(("mask_token_id", 156895), ("block_length", 32)),
    turn_end_tokens=("<|role_end|>",),
    template="role_system",
    lora_targets=ATTENTION_TARGETS,
)

DREAM = Layout(
    name="dream",  # Dream-v0 Base and Instruct, Dream-Coder, DiffuCoder
    stock="qwen2",
    architectures=("DreamModel",),
    model_types=("Dream",),
    fields=LLAMA_FIELDS,
    requires=(*QWEN_REQUIRES, ("use_mrope", (False, None))),
    logit_shift=1,
    turn_end_tokens=("<|im_end|>",),
    template="chatml_helpful",
)

SDAR = Layout(
    name="sdar",  # SDAR 1.7B, 4B, 8B and TraDo
    stock="qwen3",
    architectures=("SDARForCausalLM",),
    model_types=("sdar",),
    fields=QWEN3_FIELDS,
    requires=QWEN_REQUIRES,
    attention="block_causal",
    published=(("mask_token_id", 151669), ("block_length", 4)),
    turn_end_tokens=("<|im_end|>",),
    template="chatml",
)

SDAR_MOE = replace(
    SDAR,
    name="sdar_moe",  # SDAR-30B-A3B-Chat, -Sci
    stock="qwen3_moe",
    architectures=("SDARMoeForCausalLM",),
    model_types=("sdar_moe",),
    fields=QWEN3_MOE_FIELDS,
    experts=True,
    lora_targets=ATTENTION_TARGETS,
)

FAST_DLLM = Layout(
    name="fast_dllm_v2",  # Fast_dLLM_v2 7B and 1.5B: shifted across block borders
    stock="qwen2",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    model_types=("Fast_dLLM_Qwen",),
    fields=LLAMA_FIELDS,
    requires=QWEN_REQUIRES,
    attention="block_causal",
    logit_shift=1,
    published=(("mask_token_id", 151665), ("block_length", 32)),
    turn_end_tokens=("<|im_end|>",),
    template="chatml_helpful",
)

RND1 = Layout(
    name="rnd1",  # RND1-Base-0910
    stock="qwen3_moe",
    architectures=("RND1LM",),
    model_types=("rnd1",),
    fields=QWEN3_MOE_FIELDS,
    experts=True,
    requires=QWEN_REQUIRES,
    logit_shift=1,
    published=(("mask_token_id", 151669),),
    template="question",
    lora_targets=ATTENTION_TARGETS,
)

# The same model_type is published for two ways of training, so that the user has to say which.
A2D_MDLM = Layout(
    name="a2d_mdlm",  # dllm-hub/*-diffusion-mdlm-v0.1
    stock="",
    model_types=("a2d-llama", "a2d-qwen2", "a2d-qwen3"),
    fields=(),
    turn_end_tokens=("<|im_end|>",),
    eos_tokens=("<|endoftext|>",),  # pads replies; the config.json of a chat Qwen names the turn's end as EOS
    template="chatml_no_think",
)
A2D_BD3LM = replace(
    A2D_MDLM,
    name="a2d_bd3lm",  # dllm-hub/*-diffusion-bd3lm-v0.1
    attention="block_causal",
    alignment="left_pad_to_block",
    published=(("block_length", 32),),
)
# Its architectures are those of the autoregressive model it was made from: only the user can tell.
OPEN_DCODER = replace(A2D_MDLM, name="open_dcoder", model_types=(), logit_shift=1, template="chatml_helpful")
MODERNBERT = Layout(
    name="modernbert",  # dllm-hub/ModernBERT-{base,large}-chat-v0.1
    stock="modernbert",
    architectures=("ModernBertForMaskedLM",),
    model_types=("modernbert",),
    fields=(),
    published=(("mask_token_id", 50284),),
    turn_end_tokens=("[SEP]",),
    template="bert",
    lora_targets=("Wqkv", "Wo", "Wi"),
)
STOCK = Layout(name="stock", stock="", fields=())  # written by unmask: `unmask convert`, `save(layout="stock")`

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *(LLADA, LLADA_MOE, LLADA2, DREAM, SDAR, SDAR_MOE, FAST_DLLM, RND1),
        *(A2D_MDLM, A2D_BD3LM, OPEN_DCODER, MODERNBERT, STOCK),
    )
}
