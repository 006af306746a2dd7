"""What must hold of a loaded denoiser, proved on a short random sequence at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..recipes.registry import RecipeError

if TYPE_CHECKING:
    from .denoiser import Denoiser

LENGTH = 12


class SelfCheckError(RecipeError):
    """A denoiser that computes something else than unmask relies on."""


@torch.no_grad()
def self_check(denoiser: Denoiser) -> dict[str, str]:
    """Return one line a proven property; raises SelfCheckError at the first that fails.

    Attention: with full attention the last token moves the first position's logits; with block-causal attention it
    moves its own block's and no earlier one's, and decoding behind the cache gives the uncached logits. Padding
    neutral: left padding changes no logit. Plus mask id, embedding's padding row, precision of RoPE's frequencies.
    """
    family, model = denoiser.family, denoiser.base
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= family.mask_token_id < rows:
        raise SelfCheckError(f"mask id {family.mask_token_id} lies outside the embedding's {rows} rows.")
    if model.get_input_embeddings().padding_idx is not None:
        raise SelfCheckError("the embedding has a padding_idx, whose row never learns; set pad_token_id=None.")
    for name, buffer in model.base_model.rotary_emb.named_buffers():
        if buffer.dtype != torch.float32:
            raise SelfCheckError(f"RoPE's {name} is {buffer.dtype}; load with dtype=, never call model.to(dtype).")
    training = denoiser.model.training
    denoiser.model.eval()
    length = LENGTH if family.block_length is None else 3 * family.block_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, rows, (1, length), generator=generator).to(denoiser.device)
    plain = denoiser.logits(ids)
    if not bool(plain.isfinite().all()):
        raise SelfCheckError("the logits are not finite; the weights are damaged.")
    report = _attention(denoiser, ids, plain) | _padding(denoiser, ids, plain)
    if family.attention == "block_causal":
        report |= _cache(denoiser, ids, plain)
    denoiser.model.train(training)
    shift = "row i scores token i" if not family.logit_shift else "raw rows score the next token; moved right by one"
    return report | {
        "mask id": f"{family.mask_token_id} of {rows} rows, EOS {list(family.eos_token_ids)}",
        "alignment": shift,
        "embedding": "no padding_idx, every row learns",
        "RoPE": "frequencies in float32",
    }


def _tolerance(denoiser: Denoiser) -> float:
    # bfloat16 rounds differently in another batch shape; stacked experts may even be chosen differently.
    if next(denoiser.model.parameters()).dtype == torch.float32:
        return 1e-4
    return 0.5 if denoiser.family.mixture else 0.1


def _attention(denoiser: Denoiser, ids_1T: Tensor, plain: Tensor) -> dict[str, str]:
    """Prove who sees whom by changing the last token."""
    changed = ids_1T.clone()
    changed[0, -1] = (ids_1T[0, -1] + 1) % denoiser.family.vocab_size
    moved_T = (denoiser.logits(changed) - plain).abs().amax(dim=(0, 2))
    # A shifted row is computed from the token before it.
    first, shift = 0, denoiser.family.logit_shift
    # Stacked experts are multiplied in other shapes when a token chooses others: that rounds, but moves no meaning.
    noise = _tolerance(denoiser) * max(1.0, plain.abs().max().item()) if denoiser.family.mixture else 0.0
    if denoiser.family.block_length is not None:
        first = ids_1T.shape[1] - denoiser.family.block_length
        before = moved_T[: first + shift].max().item()
        if before > noise:
            raise SelfCheckError(f"a token moves the logits of earlier blocks by {before:.2g}: not block-causal.")
        if denoiser.family.block_length == 1:
            return {"block-causal": "blocks of 1, the last token moves no earlier logits"}
    moved = moved_T[first + shift].item()
    if moved <= noise:
        what = "first position" if denoiser.family.block_length is None else "block's first position"
        raise SelfCheckError(f"the model is causal: its {what} does not see the last token (is_causal).")
    if denoiser.family.block_length is None:
        return {"bidirectional": f"last token moves the first logits by {moved:.2g}"}
    return {
        "block-causal": f"last token moves its block of {denoiser.family.block_length} by {moved:.2g}, no earlier one"
    }


def _padding(denoiser: Denoiser, ids_1T: Tensor, plain: Tensor) -> dict[str, str]:
    family = denoiser.family
    padding = 3 if family.alignment == "shared_block" or family.block_length is None else family.block_length
    padded = torch.cat([torch.full_like(ids_1T[:, :1], family.mask_token_id).expand(-1, padding), ids_1T], dim=1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :padding] = False
    shifted = denoiser.logits(padded, padding_mask_BT=mask)[:, padding:]
    # Nothing precedes the first token, so that its row means nothing where rows are shifted.
    worst, tolerance = _difference(shifted, plain, family.logit_shift), _tolerance(denoiser)
    if not worst <= tolerance:
        raise SelfCheckError(f"padding changes the logits by {worst:.2g} of their scale (rounding: {tolerance:g}).")
    return {"padding neutral": f"left padding changes logits by {worst:.1g} of their scale"}


def _cache(denoiser: Denoiser, ids_1T: Tensor, plain: Tensor) -> dict[str, str]:
    length, cache = denoiser.family.block_length or 1, denoiser.new_cache()
    blocks = ids_1T.split(length, dim=1)
    cached = [denoiser.logits(blocks[0], cache=cache, commit=True)]
    # The second block is stored by the forward that already scores the third.
    cached.append(denoiser.logits(torch.cat([blocks[1], blocks[2]], dim=1), cache=cache, commit=length))
    worst, tolerance = _difference(torch.cat(cached, dim=1), plain, 0), _tolerance(denoiser)
    if not worst <= tolerance:
        raise SelfCheckError(f"the cache changes the logits by {worst:.2g} of their scale (rounding: {tolerance:g}).")
    return {"cache": f"blocks behind the cache differ by {worst:.1g} of the logits' scale"}


def _difference(found: Tensor, wanted: Tensor, skip: int) -> float:
    scale = max(1.0, wanted.abs().max().item())
    return (found - wanted)[:, skip:].abs().max().item() / scale
