"""Shadow columns: what a model would predict for decided tokens if it did not see them (WINO, Hong et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import RecipeError


def check_shadow(denoiser: Any) -> None:
    """Raise RecipeError where a denoiser cannot compute shadow columns."""
    what = None
    if not hasattr(denoiser, "hidden"):
        what = f"{type(denoiser).__name__} gives logits alone"
    elif denoiser.family.attention != "full":
        what = f"family '{denoiser.family.name}' attends to blocks"
    elif denoiser.base.config.model_type == "modernbert":
        what = "ModernBERT attends to a sliding window"
    elif (kernel := denoiser.base.config._attn_implementation) not in ("sdpa", "eager"):
        what = f"attention {kernel} takes no mask of ours"
    if what is not None:
        raise RecipeError(f"sampler.remasking: its shadow columns need full attention by sdpa or eager; {what}.")


def shadowed(
    denoiser: Any, ids_BT: Tensor, real_BT: Tensor | None, region_BL: Tensor, masked_BL: Tensor, width: int
) -> Tensor:
    """Return hidden states `[B, L, D]` of the canvas, those of decided tokens of the region from shadow columns.

    `ids_BT` ends with the canvas, `real_BT` says which columns are no padding, `width` is the most positions that a
    region has. The shadow of position i is a mask at i's place that sees every real column but i, and the other
    shadows; no real column sees a shadow, so that open positions are predicted as ever. From the second layer on, what
    it sees has itself seen i. Where the family shifts logits it is a copy of the column before i, which sees neither i
    nor that column nor other shadows (they hold tokens).
    """
    family, (rows, columns) = denoiser.family, ids_BT.shape
    length, shift, device = region_BL.shape[1], family.logit_shift, ids_BT.device
    place_BW = torch.argsort((~region_BL).to(torch.int8), dim=1, stable=True)[:, :width]
    target_BW = columns - length + place_BW
    inside_BW = region_BL.gather(1, place_BW)
    token_BW = ids_BT.gather(1, target_BW - 1) if shift else torch.full_like(place_BW, family.mask_token_id)
    column_T = torch.arange(columns, device=device)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT.bool()
    hidden_BWT = (column_T == target_BW[:, :, None]) | (column_T == target_BW[:, :, None] - shift)
    sees_BWT = real_BT[:, None] & ~hidden_BWT & inside_BW[:, :, None]
    itself_WW = torch.eye(width, dtype=torch.bool, device=device)
    others_BWW = itself_WW.expand(rows, -1, -1)
    if not shift:
        others_BWW = itself_WW | (inside_BW[:, None] & inside_BW[:, :, None])
    none_BTW = torch.zeros(rows, columns, width, dtype=torch.bool, device=device)
    upper_BTX = torch.cat([real_BT[:, None].expand(-1, columns, -1), none_BTW], dim=2)
    attention_BXX = torch.cat([upper_BTX, torch.cat([sees_BWT, others_BWW], dim=2)], dim=1)
    position_BX = torch.cat([column_T.expand(rows, -1), target_BW - shift], dim=1)
    found = denoiser.hidden(
        torch.cat([ids_BT, token_BW], dim=1), position_ids_BT=position_BX, attention_BTT=attention_BXX
    )
    source_BL = (columns - length - shift + torch.arange(length, device=device)).expand(rows, -1)
    shadow_BW = torch.where(inside_BW & ~masked_BL.gather(1, place_BW), columns + itself_WW.long().argmax(1), -1)
    known_BL = torch.full_like(source_BL, -1).scatter(1, place_BW, shadow_BW)
    source_BL = torch.where(known_BL >= 0, known_BL, source_BL)
    return found.gather(1, source_BL[:, :, None].expand(-1, -1, found.shape[2]))
