"""Likelihoods of given texts: a Monte-Carlo estimate of their bound, and whether greedy decoding writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.engine import denoise
from ..rollouts.noise import uniform
from ..rollouts.sampler import build_sampler
from ..rollouts.worker import pad_left


def pair_key(context: Sequence[int], target: Sequence[int]) -> int:
    """Return 62 bits that stand for a pair, so that its noise does not depend on what else is asked."""
    text = ",".join(map(str, [*context, -1, *target])).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


@torch.no_grad()
def likelihood_bound(
    denoiser: Any, context: Sequence[int], target: Sequence[int], *, draws: int = 128, seed: int = 0, batch: int = 16
) -> float:
    """Return a Monte-Carlo estimate, in nats, of a lower bound of log p(target | context), whose mean is the bound.

    E over l ~ U{1..L} and sets M of l positions of L / l sum_{i in M} log p(x_i | context, x without M) (LLaDA, arXiv
    2502.09992, equation 6). The `draws` values of l are spread evenly over 1..L from a random start; the mask token has
    probability 0. `batch` rows share a forward. Raises RecipeError for an empty target or context.
    """
    if not target or not context or draws < 1 or batch < 1:
        raise RecipeError(
            f"likelihood: {len(context)} context tokens, {len(target)} target tokens, {draws} draws in batches of "
            f"{batch}; each must be at least 1."
        )
    length, mask = len(target), denoiser.family.mask_token_id
    key = torch.tensor(pair_key(context, target))
    draw_N = torch.arange(draws)
    start = uniform(seed, "likelihood/start", 0, key)
    count_N = 1 + ((draw_N + start) / draws * length).long().clamp(max=length - 1)
    noise_NL = uniform(seed, "likelihood/mask", 0, key, draw_N[:, None], torch.arange(length))
    hidden_NL = noise_NL.argsort(dim=1).argsort(dim=1) < count_N[:, None]
    prompt_1Q, prompt_mask_1Q = pad_left([list(context)], 0, multiple=denoiser.family.prompt_multiple)
    target_L, total = torch.tensor(target), 0.0
    for rows in draw_N.split(batch):
        hidden = hidden_NL[rows]
        logprob_K = _logprob(denoiser, prompt_1Q, prompt_mask_1Q, target_L, hidden, mask)
        weight_K = (length / count_N[rows].double())[:, None].expand_as(hidden)[hidden]
        total += (logprob_K.double().cpu() * weight_K).sum().item()
    return total / draws


def _logprob(
    denoiser: Any, prompt_1Q: Tensor, prompt_mask_1Q: Tensor, target_L: Tensor, hidden_NL: Tensor, mask: int
) -> Tensor:
    """Return the log-probabilities of the hidden tokens, in row-major order."""
    device, n = getattr(denoiser, "device", torch.device("cpu")), len(hidden_NL)
    noisy_NL = torch.where(hidden_NL, mask, target_L)
    ids_NT = torch.cat([prompt_1Q.expand(n, -1), noisy_NL], dim=1).to(device)
    kept_NT = torch.cat([prompt_mask_1Q.expand(n, -1), torch.ones_like(hidden_NL)], dim=1).to(device)
    asked_NT = torch.cat([torch.zeros_like(prompt_mask_1Q).expand(n, -1), hidden_NL], dim=1).to(device)
    padding = None if bool(prompt_mask_1Q.all()) else kept_NT
    logits_KV = denoiser.logits(ids_NT, padding_mask_BT=padding, positions_BT=asked_NT)
    logits_KV[:, mask] = -torch.inf
    wanted_K = target_L.expand(n, -1)[hidden_NL].to(device)
    return logits_KV.log_softmax(dim=-1).gather(1, wanted_K[:, None])[:, 0]


def is_greedy(denoiser: Any, context: Sequence[int], target: Sequence[int]) -> bool:
    """Return whether decoding one token a step at temperature 0, the surest position first, writes the target."""
    section = {"schedule": {"name": "whole", "per_step": 1}, "score": "confidence", "eos": {"rule": "none"}}
    device = getattr(denoiser, "device", torch.device("cpu"))
    prompt_1Q, mask_1Q = pad_left([list(context)], 0, multiple=denoiser.family.prompt_multiple)
    canvas_1L = torch.full((1, len(target)), denoiser.family.mask_token_id)
    trajectory = denoise(
        denoiser,
        build_sampler(section, temperature=0.0),
        prompt_1Q.to(device),
        mask_1Q.to(device),
        canvas_1L.to(device),
        torch.zeros(1, dtype=torch.long, device=device),
        seed=0,
    )
    return trajectory.tokens_BL[0].tolist() == list(target)
