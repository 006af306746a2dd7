"""Likelihood estimators that follow an order: block by block, token by token, or over fixed masking rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy
import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .estimators import check_steps, estimator, uniform_k
from .likelihoods import Frame, Tokens, bernoulli
from .views import Views


@estimator.register
def blockwise(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    size: int,
    draws: int = 2,
    drop: float = 0.15,
    score: Literal["hidden", "block"] = "hidden",
    tokens: Tokens = "until_eos",
) -> Views:
    """SPG's canvases: a block partly hidden, all later ones hidden, earlier ones clean but for noise (A5; A0.1, E5).

    Each of `draws` takes another block of `size` positions, in random order, and hides u ~ U{1..B_b} of its B_b tokens;
    every token of the prompt and of earlier blocks is hidden with probability `drop`. All hidden tokens are scored,
    each counted L / (number scored); `block` leaves out those of later blocks. `draws` forwards. Matches what a
    block-by-block sampler sees; no estimate of the ELBO.
    """
    if draws < 1 or size < 1:
        raise RecipeError(f"estimator.size, draws: {size} and {draws} must be at least 1.")
    frame = Frame.of(trajectory, tokens, rng)
    block_L, count_BK = _blocks(frame, size, offset_B=None)
    blocks = count_BK.shape[1]
    rank_BK = frame.noise("block", frame.draws(blocks)).masked_fill(count_BK == 0, torch.inf).argsort(dim=1)
    place_BM = frame.draws(draws) % (count_BK > 0).sum(dim=1, keepdim=True).clamp(min=1)
    chosen_BM = rank_BK.gather(1, place_BM)
    inside_BM = count_BK.gather(1, chosen_BM)
    hidden_BM = 1 + (frame.noise("count", frame.draws(draws)) * inside_BM).floor().long()
    own_BML = (block_L == chosen_BM[..., None]) & frame.scored_BL[:, None]
    order_BML = frame.order(draws).masked_fill(~own_BML, trajectory.canvas).argsort(dim=2).argsort(dim=2)
    later_BML = (block_L > chosen_BM[..., None]) & frame.scored_BL[:, None]
    noisy_BML = bernoulli(frame, torch.full_like(chosen_BM, drop, dtype=torch.float64))
    earlier_BML = noisy_BML & (block_L < chosen_BM[..., None])
    hidden_BML = (own_BML & (order_BML < hidden_BM[..., None])) | later_BML | earlier_BML
    scored_BML = hidden_BML if score == "hidden" else hidden_BML & ~later_BML
    factor_BM1 = frame.count_B[:, None, None] / scored_BML.sum(dim=2, keepdim=True).clamp(min=1)
    return frame.drop_prompts(frame.views(hidden_BML, factor_BML=factor_BM1, scored_BML=scored_BML), drop)


@estimator.register
def block_elbo(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    size: int,
    draws: int = 1,
    tokens: Tokens = "until_eos",
) -> Views:
    """ELBO of a block-causal model, all blocks in one pass over [x_t ; x_0] (EBPO; A9; A0.1, E7). Unbiased.

    Every block of `size` positions, on the model's own borders, hides k_b ~ U{1..B_b} of its B_b tokens, each counted
    B_b / k_b; k_b is stratified over the blocks by a common offset, which leaves each uniform. `draws` forwards of
    twice the length.
    """
    if draws < 1 or size < 1:
        raise RecipeError(f"estimator.size, draws: {size} and {draws} must be at least 1.")
    frame = Frame.of(trajectory, tokens, rng)
    block_BL, count_BK = _blocks(frame, size, offset_B=trajectory.offset_B)
    blocks = count_BK.shape[1]
    step_1K = torch.arange(blocks, device=block_BL.device)[None] / blocks
    share_BMK = (frame.noise("count", frame.draws(draws))[..., None] + step_1K[:, None]) % 1
    hidden_BMK = 1 + (share_BMK * count_BK[:, None]).floor().long().clamp(max=(count_BK[:, None] - 1).clamp(min=0))
    index_BML = block_BL[:, None].expand(-1, draws, -1) if block_BL.dim() == 2 else block_BL.expand(1, 1, -1)
    index_BML = index_BML.expand(len(trajectory), draws, trajectory.canvas)
    # The place of a token in a random order of its block: that among all, less those of other blocks before it.
    order_BML = frame.order(draws) + index_BML * trajectory.canvas
    first_BMK = torch.full((len(trajectory), draws, blocks + 1), 0, device=block_BL.device)
    first_BMK[..., 1:] = count_BK.cumsum(dim=1)[:, None]
    # Unscored tokens come behind all others.
    order_BML = order_BML.masked_fill(~frame.scored_BL[:, None], (blocks + 1) * trajectory.canvas)
    place_BML = order_BML.argsort(dim=2).argsort(dim=2) - first_BMK.gather(2, index_BML)
    hidden_BML = (place_BML < hidden_BMK.gather(2, index_BML)) & frame.scored_BL[:, None]
    factor_BMK = count_BK[:, None] / hidden_BMK
    return frame.views(hidden_BML, factor_BML=factor_BMK.gather(2, index_BML), clean=True)


def _blocks(frame: Frame, size: int, *, offset_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the block of each position (`[L]`, or `[B, L]` with offsets) and `count_BK`, a block's scored tokens."""
    length = frame.trajectory.canvas
    place_L = torch.arange(length, device=frame.scored_BL.device)
    block = place_L // size if offset_B is None else (place_L + offset_B[:, None]) // size
    blocks = (length - 1) // size + 1 + (offset_B is not None)
    index_BL = block.expand(frame.scored_BL.shape)
    empty_BK = torch.zeros(len(index_BL), blocks, dtype=torch.long, device=index_BL.device)
    return block, empty_BK.scatter_add(1, index_BL, frame.scored_BL.long())


@estimator.register
def left_to_right(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    steps: Literal["all", "uniform_k"] = "all",
    k: int | None = None,
    tokens: Tokens = "until_eos",
) -> Views:
    """Each token with itself and all later ones hidden: the exact likelihood of the left-to-right sampler (A0.1, E8).

    A forward a token (JustGRPO); `uniform_k` keeps k of them, drawn uniformly and weighted by inclusion. The table of
    hidden tokens takes L^2 bytes a rollout.
    """
    check_steps(steps, k)
    frame = Frame.of(trajectory, tokens, rng)
    place_L = torch.arange(trajectory.canvas, device=frame.scored_BL.device)
    hidden_BLL = frame.scored_BL[:, None] & (place_L >= place_L[:, None])
    own_BLL = (place_L == place_L[:, None]) & frame.scored_BL[:, None]
    views = frame.views(hidden_BLL, scored_BML=own_BLL, sample_M=torch.zeros_like(place_L))
    return views if k is None else uniform_k(views, k, rng)


@estimator.register
def quadrature(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    nodes: int = 3,
    masks: int = 1,
    tokens: Tokens = "until_eos",
) -> Views:
    """ELBO by Gauss-Legendre nodes t_n over the masking rate: sum_n w_n / t_n mean over `masks` sum_S f (GDPO; E10).

    S hides each token with probability t_n. The integrand is a polynomial in t of degree L - 1, so that the bias is 0
    for 2 nodes >= L, and small before. nodes x masks forwards.
    """
    if nodes < 1 or masks < 1:
        raise RecipeError(f"estimator.nodes, masks: {nodes} and {masks} must be at least 1.")
    frame = Frame.of(trajectory, tokens, rng)
    place, mass = numpy.polynomial.legendre.leggauss(nodes)
    device = frame.scored_BL.device
    time_M = torch.from_numpy((place + 1) / 2).to(device).repeat_interleave(masks)
    weight_M = torch.from_numpy(mass / 2).to(device).repeat_interleave(masks) / masks
    hidden_BML = bernoulli(frame, time_M.expand(len(trajectory), -1))
    factor_1M1 = (weight_M / time_M)[None, :, None]
    views = frame.views(hidden_BML, factor_BML=factor_1M1)
    return replace(views, draws=1)


# How many canvases of a rollout each scores; see `most_canvases`.
blockwise.canvases = lambda knobs, steps, length: knobs["draws"]  # type: ignore[attr-defined]
block_elbo.canvases = lambda knobs, steps, length: knobs["draws"]  # type: ignore[attr-defined]
left_to_right.canvases = lambda knobs, steps, length: min(length, knobs["k"] or length)  # type: ignore[attr-defined]
quadrature.canvases = lambda knobs, steps, length: knobs["nodes"] * knobs["masks"]  # type: ignore[attr-defined]
