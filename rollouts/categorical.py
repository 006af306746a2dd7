"""Exact categorical draws and log-probabilities in full precision, at chosen positions only."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2048


def log_probs(logits_KV: Tensor, *, temperature: float = 1.0, banned: tuple[int, ...] = ()) -> Tensor:
    """Return log softmax(logits / temperature) over the tokens that are not `banned` (those get -inf).

    fp32 at least; float64 stays float64. Out of place, so that it can be differentiated.
    """
    logits_KV = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
    if banned:
        index = torch.tensor(banned, device=logits_KV.device)
        logits_KV = logits_KV.index_fill(-1, index, -torch.inf)
    return torch.log_softmax(logits_KV / temperature, dim=-1)


def draw(logp_KV: Tensor, uniform_K: Tensor) -> Tensor:
    """Return one token a row from exp(logp), as `draw_mass`."""
    return draw_mass(logp_KV.exp(), uniform_K)


def draw_mass(mass_KV: Tensor, uniform_K: Tensor) -> Tensor:
    """Return one token a row, each with a probability in proportion to `mass_KV`, decided by the fp64 `uniform_K`.

    Inverts the cumulative distribution in two levels (chunks of 2,048 tokens, then one chunk), which keeps fp64 to
    K x (V/2048 + 2048) numbers. A token of mass 0 is never drawn. Gumbel noise in low precision is no sampling
    (samplers.md section 6).
    """
    rows, vocabulary = mass_KV.shape
    chunks = -(-vocabulary // CHUNK)
    if chunks > 1:
        mass_KV = torch.nn.functional.pad(mass_KV, (0, chunks * CHUNK - vocabulary))
    grid_KCW = mass_KV.unflatten(1, (chunks, mass_KV.shape[1] // chunks))
    reach_KC = grid_KCW.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target_K = uniform_K * reach_KC[:, -1]
    chunk_K = (reach_KC <= target_K[:, None]).sum(dim=-1).clamp(max=chunks - 1)
    row_K = torch.arange(rows, device=mass_KV.device)
    before_K = torch.where(chunk_K > 0, reach_KC[row_K, (chunk_K - 1).clamp(min=0)], 0.0)
    inside_KW = grid_KCW[row_K, chunk_K].double()
    reach_KW = inside_KW.cumsum(dim=-1)
    # Rounding may leave the target at the chunk's very end: the last token with mass takes it.
    inner_K = (target_K - before_K).clamp(min=0.0).minimum(reach_KW[:, -1] * (1 - 2.0**-52))
    return chunk_K * inside_KW.shape[1] + (reach_KW <= inner_K[:, None]).sum(dim=-1)


def log_odds(logp_KV: Tensor) -> Tensor:
    """Return log p(v) - log(1 - p(v)) for every token, precise also where p(v) rounds to 1.

    A monotone function of the probability that does not tie among confident tokens.
    """
    best_K1, others_K1 = _best(logp_KV)
    # Only the likeliest token can be close to 1; every other one has 1 - p >= 1/2.
    complement_KV = torch.log1p(-logp_KV.exp().clamp(max=0.5 + 1e-6))
    return logp_KV - complement_KV.scatter(-1, best_K1, others_K1)


def best_logprob(logp_KV: Tensor) -> Tensor:
    """Return max_v log p(v), precise also where p rounds to 1: -log(1 + exp(-log-odds)) does not tie there."""
    best_K1, others_K1 = _best(logp_KV)
    return torch.nn.functional.logsigmoid(logp_KV.gather(-1, best_K1) - others_K1).squeeze(-1)


def _best(logp_KV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token and the log-probability of all others together, both `[K, 1]`."""
    best_K1 = logp_KV.argmax(dim=-1, keepdim=True)
    return best_K1, logp_KV.scatter(-1, best_K1, -torch.inf).logsumexp(dim=-1, keepdim=True)
