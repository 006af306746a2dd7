"""Weights between a vendor's layout and the stock class's: renamed, a fused projection split, experts stacked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import CheckpointError, Layout

EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
FUSED = "query_key_value"
Named = Iterable[tuple[str, Tensor]]


def to_stock(layout: Layout, config: Any, tensors: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield the stock class's names and tensors for a vendor's, each vendor tensor used exactly once.

    `config` is the stock config. Experts are copied into one stacked tensor a layer as they arrive, so that no more
    than that layer is held twice; raises CheckpointError for experts that are missing or out of range.
    """
    stacks: dict[str, Tensor] = {}
    waiting: dict[str, set[str]] = {}
    for key, value in tensors:
        expert = EXPERT.match(key) if layout.experts else None
        if expert is not None:
            prefix, index, part = expert[1], int(expert[2]), expert[3]
            name = f"{prefix}.down_proj" if part == "down_proj" else f"{prefix}.gate_up_proj"
            if name not in stacks:
                stacks[name] = _empty_stack(config, value, double=part != "down_proj")
                waiting[name] = _expert_keys(config, prefix, part)
            if key not in waiting[name]:
                raise CheckpointError(f"'{key}': config.json says there are {_experts(config)} experts.")
            _place(stacks[name], index, part, value, key)
            waiting[name].discard(key)
            if not waiting[name]:
                yield layout.to_stock(name), stacks.pop(name)
        elif FUSED in key and layout.fused_qkv:
            yield from _split_qkv(layout.to_stock(key), value, config)
        else:
            yield layout.to_stock(key), value
    for name in stacks:
        missing = sorted(waiting[name])
        raise CheckpointError(f"{len(missing)} experts' tensors are missing, first '{missing[0]}'; download it again.")


def to_vendor(layout: Layout, config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vendor's names and tensors for a stock state dict, the inverse of `to_stock`; views where possible."""
    vendor: dict[str, Tensor] = {}
    for key, value in state.items():
        if layout.experts and ".mlp.experts." in key:
            prefix, _, part = key.rpartition(".")
            for index, expert in enumerate(value.unbind(0)):
                parts = expert.chunk(2) if part == "gate_up_proj" else (expert,)
                names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
                for name, tensor in zip(names, parts, strict=True):
                    vendor[layout.to_vendor(f"{prefix}.{index}.{name}.weight")] = tensor
        elif layout.fused_qkv and (match := re.match(r"^(.*)\.self_attn\.([qkv])_proj\.weight$", key)):
            if match[2] == "q":
                projections = [state[f"{match[1]}.self_attn.{part}_proj.weight"] for part in "qkv"]
                vendor[layout.to_vendor(f"{match[1]}.self_attn.{FUSED}.weight")] = torch.cat(projections)
        else:
            vendor[layout.to_vendor(key)] = value
    return vendor


def _experts(config: Any) -> int:
    return getattr(config, "num_experts", None) or config.n_routed_experts


def _expert_keys(config: Any, prefix: str, part: str) -> set[str]:
    parts = ("down_proj",) if part == "down_proj" else ("gate_proj", "up_proj")
    return {f"{prefix}.{index}.{name}.weight" for index in range(_experts(config)) for name in parts}


def _empty_stack(config: Any, sample: Tensor, *, double: bool) -> Tensor:
    rows, columns = sample.shape
    return sample.new_empty(_experts(config), 2 * rows if double else rows, columns)


def _place(stack: Tensor, index: int, part: str, value: Tensor, key: str) -> None:
    target = stack[index] if part == "down_proj" else stack[index].chunk(2)[part == "up_proj"]
    if target.shape != value.shape:
        raise CheckpointError(f"'{key}' has shape {tuple(value.shape)}, other experts {tuple(target.shape)}.")
    target.copy_(value)


def _split_qkv(key: str, value: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    head = config.head_dim
    sizes = [config.num_attention_heads * head, config.num_key_value_heads * head, config.num_key_value_heads * head]
    if sum(sizes) != value.shape[0]:
        raise CheckpointError(f"'{key}' has {value.shape[0]} rows, config.json's heads make {sum(sizes)}.")
    for part, rows in zip("qkv", value.split(sizes), strict=True):
        yield key.replace(FUSED, f"{part}_proj"), rows
