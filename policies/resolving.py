"""From a config.json to a layout and a Family: who a checkpoint is, its ids, its block; refusals before any weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..recipes.registry import nearest
from .families import LAYOUTS, STOCK
from .layout import CheckpointError, Family, Layout

BLOCK_FIELDS = ("block_size", "block_length", "bd_size")
AUTOREGRESSIVE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")


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
    """Return the layout for a config.json: by `family` if given, else by its `architectures`, else its `model_type`."""
    if family is not None:
        if family not in LAYOUTS:
            raise CheckpointError(f"model.family: unknown family '{family}'.{nearest(family, list(LAYOUTS))}")
        return LAYOUTS[family]
    if isinstance(config.get("unmask"), dict):
        return STOCK
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    found = [layout for layout in LAYOUTS.values() if set(architectures) & set(layout.architectures)]
    found = found or [layout for layout in LAYOUTS.values() if model_type in layout.model_types]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(layout.name for layout in found)
        raise CheckpointError(
            f"config.json: model_type '{model_type}' is published for several; set model.family={names}."
        )
    if set(architectures) & set(AUTOREGRESSIVE):
        raise CheckpointError(
            f"model.path: {architectures[0]} is an autoregressive model; `unmask convert` makes a denoiser of it, or "
            "set model.family (a2d_mdlm, a2d_bd3lm, open_dcoder) if it has been trained as one."
        )
    raise CheckpointError(
        f"model.path: architectures {architectures} belong to no known family ({', '.join(LAYOUTS)}); set model.family "
        "if the folder is laid out like one of them."
    )


def check_config(config: Mapping[str, Any], layout: Layout) -> None:
    """Raise CheckpointError where the config asks for what the stock class does not compute."""
    for key, allowed in layout.requires:
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r}, but family '{layout.name}' is loaded with {allowed[0]!r} only."
            )


def resolve_family(
    config: Mapping[str, Any],
    layout: Layout,
    mask_token_id: int | None = None,
    *,
    block_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Family:
    """Return the Family of a config.json; CheckpointError for missing, foreign or contradictory ids and blocks.

    The mask id is the caller's, else config.json's, else the tokenizer's; published values are never assumed.
    """
    ours = config.get("unmask") or {}
    rows = config.get("embedding_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        raise CheckpointError(f"config.json: vocab_size is {rows!r}, a whole number is needed.")
    known = (mask_token_id, ours.get("mask_token_id"), config.get("mask_token_id"))
    mask = next((value for value in known if value is not None), None)
    if mask is None and tokenizer is not None:
        mask = tokenizer.mask_token_id
    if mask is None:
        published = dict(layout.published).get("mask_token_id", "...")
        raise CheckpointError(
            f"config.json has no mask_token_id; pass mask_token_id={published} (model.mask_token_id in a recipe; "
            "see the model's card)."
        )
    eos_ids, turn_end = _ends(config, layout, tokenizer, rows)
    for name, value in [("mask_token_id", mask), *(("eos_token_id", i) for i in eos_ids)]:
        if not isinstance(value, int):
            raise CheckpointError(f"config.json: {name} is {value!r}, a whole number is needed.")
        if not 0 <= value < rows:
            raise CheckpointError(f"{name} {value} lies outside the embedding's {rows} rows.")
    if mask in eos_ids:
        raise CheckpointError(f"mask_token_id {mask} equals the EOS id; a committed EOS could not be told from a mask.")
    attention = ours.get("attention", layout.attention)
    return Family(
        name=layout.name,
        vocab_size=rows,
        mask_token_id=mask,
        eos_token_ids=eos_ids,
        turn_end_id=turn_end,
        attention=attention,
        block_length=_block_length(config, layout, attention, block_length),
        logit_shift=ours.get("logit_shift", layout.logit_shift),
        alignment=ours.get("alignment", layout.alignment),
        lora_targets=tuple(ours.get("lora_targets", layout.lora_targets)),
        mixture=layout.experts or bool(ours.get("mixture")),
    )


def _ends(
    config: Mapping[str, Any], layout: Layout, tokenizer: PreTrainedTokenizerBase | None, rows: int
) -> tuple[tuple[int, ...], int | None]:
    """Return what ends a completion, EOS first, and what ends a turn; LLaDA2's config.json names its EOS as padding."""
    ours = config.get("unmask") or {}
    eos = ours.get("eos_token_ids") or config.get("eos_token_id")
    eos = config.get("pad_token_id") if eos is None else eos
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    ids = list(eos) if isinstance(eos, list) else ([] if eos is None else [eos])
    turn = [i for i in layout.turn_end_ids if i < rows]
    if tokenizer is not None and layout.turn_end_tokens:
        vocabulary = tokenizer.get_vocab()
        turn += [vocabulary[token] for token in layout.turn_end_tokens if token in vocabulary]
        ids = [vocabulary[token] for token in layout.eos_tokens if token in vocabulary] + ids
    return tuple(dict.fromkeys([*ids, *turn])), ours.get("turn_end_id", turn[0] if turn else None)


def _block_length(config: Mapping[str, Any], layout: Layout, attention: str, given: int | None) -> int | None:
    if attention != "block_causal":
        if given is not None:
            raise CheckpointError(
                f"block_length: {given}, but family '{layout.name}' attends to the whole canvas; leave it out (a "
                "sampler's blocks are rollout.sampler.schedule.size)."
            )
        return None
    found = [config[field] for field in BLOCK_FIELDS if config.get(field) is not None]
    length = (
        given if given is not None else (config.get("unmask") or {}).get("block_length", found[0] if found else None)
    )
    if length is None:
        raise CheckpointError(
            f"config.json has no block length, which block-causal family '{layout.name}' needs; pass "
            f"block_length={dict(layout.published).get('block_length', '...')} (model.block_length in a recipe)."
        )
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(f"block_length: {length!r} must be a whole number of at least 1.")
    return length
