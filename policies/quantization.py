"""Bases in 4 bits (NF4, QLoRA: Dettmers et al. 2023) by bitsandbytes: linear layers and stacked experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layout import CheckpointError

STACKS = ("gate_up_proj", "down_proj")


def check_quantization(name: str) -> None:
    """Raise CheckpointError for a word that is not "4bit", or without bitsandbytes."""
    if name != "4bit":
        raise CheckpointError(f"model.quantization: '{name}' is not 4bit.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise CheckpointError("model.quantization: 4bit needs bitsandbytes; pip install 'unmask[4bit]'.") from error


def quantized(kind: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, device: str) -> Any:
    """Return a `kind` on `device` with its linear layers but the head, and its stacked experts, in 4 bits.

    `state` lies on the CPU and is emptied. A layer's experts are unpacked for every forward and again for its backward.
    """
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import BitsAndBytesConfig

    mixture = any(key.endswith(STACKS) for key in state)
    # Experts that came to the device in full would not fit where they do in 4 bits.
    place = "cpu" if mixture else device
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    options: dict[str, Any] = {"quantization_config": quantization, "device_map": {"": place}, "dtype": dtype}
    model = kind.from_pretrained(None, config=config, state_dict=state, **options)
    state.clear()
    model.name_or_path = ""  # it is "None" now, which peft would look up on the hub at every save
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode it would repack weights for a CPU's bfloat16 units, through which no gradient flows.
            module.support_avx512bf16_for_cpu = False
    recompute_experts(model)
    for module in stacked_experts(model):
        module.to(device)
        for name in STACKS:
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model.to(device) if mixture else model


def stacked_experts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold a layer's experts as 3D tensors."""
    for module in list(model.modules()):
        if getattr(getattr(module, STACKS[0], None), "ndim", 0) == 3:
            yield module


def recompute_experts(model: nn.Module) -> None:
    """Keep no layer's unpacked experts for the backward, which is 4 times their 4 bits for all layers together."""
    for module in stacked_experts(model):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
