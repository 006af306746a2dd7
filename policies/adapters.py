"""LoRA adapters by peft: attached with a keyed initialisation, checked, named, merged."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..recipes.registry import RecipeError, nearest
from .denoiser import Denoiser

logger = logging.getLogger(__name__)


def lora_config(
    denoiser: Denoiser, *, rank: int = 16, alpha: float = 0.0, dropout: float = 0.0, targets: list[str] | None = None
) -> LoraConfig:
    """Return peft's config over the family's linear layers, or `targets`; `alpha` 0 means 2 x rank."""
    # peft's annotation says int, its arithmetic takes any number; cutting 0.5 to 0 would switch the adapter off.
    scale: Any = alpha or 2 * rank
    return LoraConfig(
        r=rank,
        lora_alpha=int(scale) if float(scale).is_integer() else scale,
        lora_dropout=dropout,
        target_modules=list(targets or denoiser.family.lora_targets),
        bias="none",
    )


def attach_adapter(denoiser: Denoiser, config: Any, *, seed: int = 0) -> Denoiser:
    """Return the denoiser with a new adapter, only which is trainable; logs the adapted modules.

    Raises RecipeError for a target that matches nothing, or the LM head, which rollouts call on its own.
    """
    check_targets(denoiser.base, config.target_modules, mixture=denoiser.family.mixture)
    # peft draws the adapter's first factor from the global generator: give it one of ours for the moment.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        # On the meta device nothing is drawn; peft would do so on the CPU first.
        model = get_peft_model(denoiser.model, config, low_cpu_mem_usage=denoiser.device.type == "meta")
    names = adapted_modules(model)
    kinds = sorted({name.rpartition(".")[2] for name in names})
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if denoiser.device.type != "meta":
        logger.info("LoRA rank %d on %d modules (%s), %d parameters", config.r, len(names), ", ".join(kinds), trainable)
    return replace(denoiser, model=model.eval())


def check_targets(model: nn.Module, targets: Any, *, mixture: bool = False) -> None:
    """Raise RecipeError unless every target names at least one linear layer other than the LM head.

    In a mixture of experts also for targets outside the attention: experts are stacked into 3D parameters there, peft
    turns these names into all of them, and silently leaves shared experts and dense layers without an adapter.
    """
    if not targets:
        raise RecipeError("model.lora.targets: the peft config names no target_modules; list attention and MLP layers.")
    if isinstance(targets, str):  # a regular expression or "all-linear": peft itself refuses what matches nothing
        if mixture:
            raise RecipeError(
                f"model.lora.targets: '{targets}' would reach routers and stacked experts of a mixture; list attention "
                "layers (q_proj, k_proj, v_proj, o_proj)."
            )
        return
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    for target in sorted(targets):
        leaf = target.rpartition(".")[2]
        if mixture and leaf in ("gate_proj", "up_proj", "down_proj", "gate"):
            raise RecipeError(
                f"model.lora.targets: '{target}' of a mixture of experts would adapt the stacked experts and leave "
                "shared experts and dense layers out; list attention layers (q_proj, k_proj, v_proj, o_proj)."
            )
        hits = [path for path in paths if path == target or path.endswith(f".{target}")]
        if not hits:
            raise RecipeError(f"model.lora.targets: '{target}' matches no linear layer.{nearest(target, leaves)}")
        if {"lm_head", "decoder"} & set(hits):
            raise RecipeError(f"model.lora.targets: '{target}' cannot be adapted; choose attention and MLP layers.")


def adapted_modules(model: PeftModel) -> list[str]:
    """Return the full names of the modules that carry an adapter."""
    return sorted(name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A"))


def merged(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser with its adapter merged into the weights (in place), or itself without one."""
    if not isinstance(denoiser.model, PeftModel):
        return denoiser
    return replace(denoiser, model=denoiser.model.merge_and_unload())
