"""NTK scaling of RoPE: a model reads sequences longer than those it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .layout import CheckpointError, Layout


def ntk_theta(config: Any, context: int) -> float:
    """Return RoPE's base for `context` tokens: theta x ceil((context / 2 pi)^(d / d_c) / theta).

    d is the rotated part of a head and d_c = 2 ceil(d/2 log_theta(trained / 2 pi)) those dimensions that saw a whole
    turn in training (LongLLaDA, Liu et al. 2025, section 4; it gives 4, 14, 31, 55 for LLaDA-8B at 8k, 16k, 24k, 32k).
    """
    trained, theta = config.max_position_embeddings, config.rope_parameters["rope_theta"]
    if context <= trained:
        return theta
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    critical = 2 * math.ceil(size / 2 * math.log(trained / (2 * math.pi), theta))
    return theta * math.ceil((context / (2 * math.pi)) ** (size / critical) / theta)


def rescale(config: Any, layout: Layout, vendor: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Rescale the stock `config` for `context` tokens in place and return the vendor's config that says the same.

    A folder saved with it needs no rescaling any more. Raises CheckpointError where RoPE has several bases, or is
    scaled already.
    """
    rope = config.rope_parameters
    if "rope_theta" not in rope:
        raise CheckpointError(f"model.context: family '{layout.name}' has several RoPE bases ({', '.join(rope)}).")
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"model.context: config.json scales RoPE already ({rope['rope_type']}); leave model.context out."
        )
    if context <= config.max_position_embeddings:
        return dict(vendor)
    theta = ntk_theta(config, context)
    rope["rope_theta"], config.max_position_embeddings = theta, context
    (length, *_) = dict(layout.fields).get("max_position_embeddings", ("max_position_embeddings",))
    written = {**vendor, length: context, "rope_theta": theta}
    if isinstance(vendor.get("rope_parameters"), dict):
        written["rope_parameters"] = {**vendor["rope_parameters"], "rope_theta": theta}
        if "rope_theta" not in vendor:
            del written["rope_theta"]
    return written
