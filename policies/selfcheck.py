"""What must hold of a loaded denoiser, proved on a short random sequence at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..recipes.registry import RecipeError

if TYPE_CHECKING:
    from .denoiser import Denoiser

LENGTH = 12


class SelfCheckError(RecipeError):
    """A denoiser that computes something else than unmask relies on."""


@torch.no_grad()
def self_check(denoiser: Denoiser) -> dict[str, str]:
    """Return one line a proven property; raises SelfCheckError at the first that fails.

    Bidirectional: changing the last token moves the first position's logits. Padding neutral: left padding changes no
    logit. Plus the mask id, the embedding's padding row and the precision of RoPE's frequencies.
    """
    family, model = denoiser.family, denoiser.base
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= family.mask_token_id < rows:
        raise SelfCheckError(f"mask id {family.mask_token_id} lies outside the embedding's {rows} rows.")
    if model.get_input_embeddings().padding_idx is not None:
        raise SelfCheckError("the embedding has a padding_idx, whose row never learns; set pad_token_id=None.")
    frequencies = model.model.rotary_emb.inv_freq
    if frequencies.dtype != torch.float32:
        raise SelfCheckError(f"RoPE frequencies are {frequencies.dtype}; load with dtype=, never call model.to(dtype).")
    training = denoiser.model.training
    denoiser.model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, rows, (1, LENGTH), generator=generator).to(denoiser.device)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % rows
    plain = denoiser.logits(ids)
    if not bool(plain.isfinite().all()):
        raise SelfCheckError("the logits are not finite; the weights are damaged.")
    moved = (denoiser.logits(changed)[0, 0] - plain[0, 0]).abs().max().item()
    if moved == 0.0:
        raise SelfCheckError("the model is causal: its first position does not see the last token (is_causal).")
    padding = 3
    padded = torch.cat([torch.full_like(ids[:, :padding], family.mask_token_id), ids], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :padding] = False
    shifted = denoiser.logits(padded, padding_mask_BT=mask)[:, padding:]
    scale = max(1.0, plain.abs().max().item())
    worst = (shifted - plain).abs().max().item() / scale
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.1
    if not worst <= tolerance:
        raise SelfCheckError(f"padding changes the logits by {worst:.2g} of their scale (rounding: {tolerance:g}).")
    denoiser.model.train(training)
    return {
        "bidirectional": f"last token moves the first logits by {moved:.2g}",
        "padding neutral": f"left padding changes logits by {worst:.1g} of their scale",
        "mask id": f"{family.mask_token_id} of {rows} rows, EOS {list(family.eos_token_ids)}",
        "embedding": "no padding_idx, every row learns",
        "RoPE": "frequencies in float32",
    }
