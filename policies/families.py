"""Families of denoisers: how a published checkpoint folder maps onto a stock transformers class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.registry import nearest


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as a denoiser; the message names file, rule and remedy."""


@dataclass(frozen=True)
class Family:
    """What is particular to one loaded denoiser; ids are those of its own vocabulary."""

    name: str
    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    attention: str = "full"
    logit_shift: int = 0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layout:
    """How a vendor's folder is laid out: which configs it matches and how they and the keys translate.

    `key_mapping` holds (vendor regex, stock replacement) and `key_unmapping` the way back, so that a saved model is
    again what the vendor's own code reads.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    stock_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    key_mapping: tuple[tuple[str, str], ...] = ()
    key_unmapping: tuple[tuple[str, str], ...] = ()
    turn_end_ids: tuple[int, ...] = ()
    requires: tuple[tuple[str, Any], ...] = field(default=())

    def to_stock(self, key: str) -> str:
        """Return the stock name of a vendor's weight."""
        return _rename(key, self.key_mapping)

    def to_vendor(self, key: str) -> str:
        """Return the vendor's name of a stock weight."""
        return _rename(key, self.key_unmapping)


def _rename(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in pairs:
        key, hits = re.subn(pattern, replacement, key)
        if hits:
            return key
    return key


def _llada_config(vendor: Mapping[str, Any]) -> dict[str, Any]:
    """Return LlamaConfig fields for LLaDA's config.json (reference: GSAI-ML/LLaDA-8B-Instruct)."""
    return {
        "vocab_size": vendor.get("embedding_size") or vendor["vocab_size"],
        "hidden_size": vendor["d_model"],
        "intermediate_size": vendor.get("mlp_hidden_size") or vendor["mlp_ratio"] * vendor["d_model"],
        "num_hidden_layers": vendor["n_layers"],
        "num_attention_heads": vendor["n_heads"],
        "num_key_value_heads": vendor.get("n_kv_heads") or vendor["n_heads"],
        "max_position_embeddings": vendor["max_sequence_length"],
        "rms_norm_eps": vendor["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": vendor["rope_theta"]},
        "attention_bias": vendor.get("include_qkv_bias") or False,
        "mlp_bias": vendor.get("include_bias") or False,
        "tie_word_embeddings": vendor.get("weight_tying", False),
        "hidden_act": vendor["activation_type"],
        "initializer_range": vendor.get("init_std", 0.02),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def llada_vendor_config(stock: Any, family: Family) -> dict[str, Any]:
    """Return LLaDA's config.json for a stock LlamaConfig (used for models that unmask makes itself)."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": stock.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": stock.rope_parameters["rope_theta"],
        "activation_type": stock.hidden_act,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "alibi": False,
        "d_model": stock.hidden_size,
        "n_layers": stock.num_hidden_layers,
        "n_heads": stock.num_attention_heads,
        "n_kv_heads": stock.num_key_value_heads,
        "mlp_hidden_size": stock.intermediate_size,
        "mlp_ratio": 4,
        "vocab_size": stock.vocab_size,
        "embedding_size": stock.vocab_size,
        "weight_tying": stock.tie_word_embeddings,
        "max_sequence_length": stock.max_position_embeddings,
        "mask_token_id": family.mask_token_id,
        "eos_token_id": family.eos_token_ids[0],
        "pad_token_id": family.eos_token_ids[0],
        "init_std": stock.initializer_range,
        "use_cache": False,
        "torch_dtype": str(stock.dtype or "float32").removeprefix("torch."),
    }


LLADA = Layout(
    name="llada",
    matches=lambda config: "LLaDAModelLM" in (config.get("architectures") or []),
    stock_config=_llada_config,
    # The head's leaf has the same name as the blocks' down projection, so the block patterns come first.
    key_mapping=(
        (r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"^model\.transformer\.blocks\.(\d+)\.([qkv]_proj)\.", r"model.layers.\1.self_attn.\2."),
        (r"^model\.transformer\.blocks\.(\d+)\.attn_out\.", r"model.layers.\1.self_attn.o_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.up_proj\.", r"model.layers.\1.mlp.up_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_out\.", r"model.layers.\1.mlp.down_proj."),
        (r"^model\.transformer\.wte\.", r"model.embed_tokens."),
        (r"^model\.transformer\.ln_f\.", r"model.norm."),
        (r"^model\.transformer\.ff_out\.", r"lm_head."),
    ),
    key_unmapping=(
        (r"^model\.layers\.(\d+)\.input_layernorm\.", r"model.transformer.blocks.\1.attn_norm."),
        (r"^model\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.", r"model.transformer.blocks.\1.\2."),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj\.", r"model.transformer.blocks.\1.attn_out."),
        (r"^model\.layers\.(\d+)\.post_attention_layernorm\.", r"model.transformer.blocks.\1.ff_norm."),
        (r"^model\.layers\.(\d+)\.mlp\.gate_proj\.", r"model.transformer.blocks.\1.ff_proj."),
        (r"^model\.layers\.(\d+)\.mlp\.up_proj\.", r"model.transformer.blocks.\1.up_proj."),
        (r"^model\.layers\.(\d+)\.mlp\.down_proj\.", r"model.transformer.blocks.\1.ff_out."),
        (r"^model\.embed_tokens\.", r"model.transformer.wte."),
        (r"^model\.norm\.", r"model.transformer.ln_f."),
        (r"^lm_head\.", r"model.transformer.ff_out."),
    ),
    # <|eot_id|> ends a turn of the Instruct checkpoints; smaller vocabularies do not have it.
    turn_end_ids=(126348,),
    requires=(
        ("block_type", "llama"),
        ("layer_norm_type", "rms"),
        ("activation_type", "silu"),
        ("rope", True),
        ("attention_layer_norm", False),
        ("input_emb_norm", False),
        ("scale_logits", False),
        ("alibi", False),
    ),
)

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (LLADA,)}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json; CheckpointError when there is none or it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"model.path: '{folder}' holds no config.json, so it is not a checkpoint folder.")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, a JSON object is needed.")
    return config


def find_layout(config: Mapping[str, Any], family: str | None) -> Layout:
    """Return the layout for a config.json: by `family` if given, else by its `architectures`."""
    if family is not None:
        if family not in LAYOUTS:
            raise CheckpointError(f"model.family: unknown family '{family}'.{nearest(family, list(LAYOUTS))}")
        return LAYOUTS[family]
    for layout in LAYOUTS.values():
        if layout.matches(config):
            return layout
    raise CheckpointError(
        f"model.path: architectures {config.get('architectures')} belong to no known family "
        f"({', '.join(LAYOUTS)}); set model.family if the folder is laid out like one of them."
    )


def check_config(config: Mapping[str, Any], layout: Layout) -> None:
    """Raise CheckpointError where the config asks for what the stock class does not compute."""
    for key, wanted in layout.requires:
        if config.get(key, wanted) != wanted:
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r}, but family '{layout.name}' is loaded with {wanted!r} only."
            )


def resolve_family(config: Mapping[str, Any], layout: Layout, mask_token_id: int | None) -> Family:
    """Return the Family of a config.json; CheckpointError when its mask id is missing, out of range or equal to EOS."""
    rows = config.get("embedding_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        raise CheckpointError(f"config.json: vocab_size is {rows!r}, a whole number is needed.")
    mask = mask_token_id if mask_token_id is not None else config.get("mask_token_id")
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    if mask is None:
        raise CheckpointError("config.json has no mask_token_id; pass mask_token_id=... (see the model's card).")
    for name, value in [("mask_token_id", mask), *(("eos_token_id", i) for i in eos_ids)]:
        if not isinstance(value, int):
            raise CheckpointError(f"config.json: {name} is {value!r}, a whole number is needed.")
        if not 0 <= value < rows:
            raise CheckpointError(f"{name} {value} lies outside the embedding's {rows} rows.")
    if mask in eos_ids:
        raise CheckpointError(f"mask_token_id {mask} equals the EOS id; a committed EOS could not be told from a mask.")
    eos_ids += tuple(i for i in layout.turn_end_ids if i < rows and i not in eos_ids)
    return Family(layout.name, vocab_size=rows, mask_token_id=mask, eos_token_ids=eos_ids)
