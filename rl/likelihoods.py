"""Likelihood estimators: log p(completion) from canvases that no step saw, with tokens hidden by a rule.

Each is a rule for which tokens are hidden and what the log-prob of a hidden one counts (`likelihood_rl.md`, A0.1).
Draws are keyed by rollout id, so that batch composition and ranks do not change them, and what was drawn is stored:
old, current and reference policies score the very same canvases. Only the final canvas is scored; given tokens stay
visible, and with `tokens: until_eos` what lies behind the first EOS is hidden and never scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.noise import uniform
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import SAMPLED, Trajectory
from .estimators import estimator
from .views import Views

Tokens = Literal["until_eos", "all"]


@dataclass(frozen=True)
class Frame:
    """What an estimator draws for: `scored_BL` tokens, `behind_BL` those that are always hidden, and a seed."""

    trajectory: Trajectory
    scored_BL: Tensor
    behind_BL: Tensor
    seed: int

    @staticmethod
    def of(trajectory: Trajectory, tokens: str, rng: torch.Generator | None, *, hints: bool = False) -> Frame:
        """Return the frame of a trajectory, whose `hints` may be scored like its own tokens; draws need a generator."""
        scored_BL = trajectory.action_BL(tokens)
        hidden_BL = trajectory.source_BL == SAMPLED
        if hints:
            scored_BL = scored_BL | trajectory.hint_BL(tokens)
            hidden_BL = hidden_BL | trajectory.hint_BL("all")
        behind_BL = hidden_BL & ~scored_BL
        seed = 0 if rng is None else int(torch.randint(2**62, (), generator=rng))
        return Frame(trajectory, scored_BL, behind_BL, seed)

    @property
    def count_B(self) -> Tensor:
        """The number of scored tokens."""
        return self.scored_BL.sum(dim=1)

    def noise(self, purpose: str, *keys: Tensor) -> Tensor:
        """Return fp64 uniforms, one for each rollout (first dimension) and entry of the broadcast `keys`."""
        id_B = self.trajectory.rollout_id_B
        shape = (-1, *[1] * (max((key.dim() for key in keys), default=1) - 1))
        return uniform(self.seed, purpose, 0, id_B.view(shape), *keys)

    def draws(self, count: int) -> Tensor:
        """Return 0 .. count - 1 as `[1, count]`."""
        return torch.arange(count, device=self.scored_BL.device)[None]

    def order(self, count: int) -> Tensor:
        """Return `place_BML`: the place of every token in a random order of the scored ones, one a draw."""
        length = self.trajectory.canvas
        position = torch.arange(length, device=self.scored_BL.device).view(1, 1, length)
        noise_BML = self.noise("order", self.draws(count)[..., None], position)
        noise_BML = noise_BML.masked_fill(~self.scored_BL[:, None], torch.inf)
        return noise_BML.argsort(dim=2).argsort(dim=2)

    def views(
        self,
        hidden_BML: Tensor,
        *,
        factor_BML: Tensor | None = None,
        scored_BML: Tensor | None = None,
        sample_M: Tensor | None = None,
        draws: int | None = None,
        clean: bool = False,
    ) -> Views:
        """Return a view for every rollout and canvas, without those that score nothing.

        `hidden_BML` are the scored tokens under the mask, of which those of `scored_BML` (default: all) are scored;
        `factor_BML` (broadcastable, default 1) is what each counts in the estimate of its draw `sample_M`.
        """
        trajectory, (rows, count, length) = self.trajectory, hidden_BML.shape
        scored_NL = (hidden_BML if scored_BML is None else hidden_BML & scored_BML).reshape(-1, length)
        factor_NL = torch.ones(()) if factor_BML is None else factor_BML
        factor_NL = factor_NL.to(hidden_BML.device).expand(hidden_BML.shape).reshape(-1, length)
        row_N = torch.arange(rows, device=hidden_BML.device).repeat_interleave(count)
        sample_N = (torch.arange(count, device=row_N.device) if sample_M is None else sample_M).repeat(rows)
        kept_N = scored_NL.any(dim=1)
        view_K, position_K = scored_NL[kept_N].nonzero(as_tuple=True)
        row_N, scored_NL = row_N[kept_N], scored_NL[kept_N]
        return Views(
            trajectory=trajectory,
            row_N=row_N,
            # The canvas that the rollout ended with, from which the estimator hides.
            step_N=trajectory.steps_B[row_N].long(),
            inclusion_N=torch.ones(len(row_N), device=row_N.device),
            view_K=view_K,
            position_K=position_K,
            target_K=trajectory.tokens_BL[row_N[view_K], position_K],
            behaviour_K=torch.zeros(len(view_K), device=row_N.device),
            count_B=self.count_B,
            views_B=torch.bincount(row_N, minlength=rows),
            hidden_NL=(hidden_BML | self.behind_BL[:, None]).reshape(-1, length)[kept_N],
            factor_K=factor_NL[kept_N][view_K, position_K].float(),
            sample_N=sample_N[kept_N],
            draws=(count if sample_M is None else 1) if draws is None else draws,
            clean=clean,
            recorded=False,
        )

    def drop_prompts(self, views: Views, share: float) -> Views:
        """Return the views with each prompt token under the mask with probability `share`, stored as data."""
        if not 0 <= share < 1:
            raise RecipeError(f"estimator: the share of dropped prompt tokens, {share}, must lie in [0, 1).")
        if share == 0:
            return views
        mask_BQ = self.trajectory.prompt_mask_BQ
        # Counted from the right end: left padding must not change which tokens are dropped.
        place_1Q = torch.arange(mask_BQ.shape[1], 0, -1, device=mask_BQ.device)[None]
        assert views.sample_N is not None
        noise_NQ = uniform(
            self.seed,
            "prompt",
            0,
            self.trajectory.rollout_id_B[views.row_N][:, None],
            views.sample_N[:, None],
            place_1Q,
        )
        return replace(views, prompt_hidden_NQ=(noise_NQ < share) & mask_BQ[views.row_N])


@estimator.register
def fully_masked(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    prompt_drop: float = 0.0,
    tokens: Tokens = "until_eos",
    hints: bool = False,
) -> Views:
    """Every token from a canvas of masks: sum_i log p(y_i | all masked), the mean-field estimate (d1; A0.1, E1).

    Each prompt token is under the mask with probability `prompt_drop`. With `hints` the hints are hidden and scored too
    (IGPO). One forward. Biased: it has no order to the
    ELBO, and is exact only where tokens are independent given the prompt.
    """
    frame = Frame.of(trajectory, tokens, rng, hints=hints)
    return frame.drop_prompts(frame.views(frame.scored_BL[:, None]), prompt_drop)


@estimator.register
def random_mask(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    draws: int = 1,
    draw: Literal["stratified", "independent", "bernoulli", "ladder"] = "stratified",
    start: float = 0.1,
    tokens: Tokens = "until_eos",
    hints: bool = False,
) -> Views:
    """ELBO: L/k x sum over k hidden tokens, k uniform on 1..L, a mean over `draws` (LLaDA; A0.1, E3). Unbiased.

    `stratified` spreads the draws: k_j = 1 + floor(((u + j/M) mod 1) L), u ~ U(0, 1), uniform for every L and M (the
    common round(linspace) is not: P9). `bernoulli` hides each token with t ~ U(0, 1) and counts 1/t, of large variance.
    `ladder` is UniGRPO's: Bernoulli masks at a share that rises evenly from t0 ~ U(`start`, 1) in the first inner step
    to 1 in the last; every hidden token counts 1. With `hints` the hints are hidden and scored too.
    `draws` forwards.
    """
    if draws < 1:
        raise RecipeError(f"estimator.draws: {draws} must be at least 1.")
    frame = Frame.of(trajectory, tokens, rng, hints=hints)
    count_B1, m_1M = frame.count_B[:, None], frame.draws(draws)
    if draw in ("stratified", "independent"):
        own_BM = frame.noise("count", m_1M if draw == "independent" else torch.zeros_like(m_1M))
        share_BM = (own_BM + m_1M / draws) % 1 if draw == "stratified" else own_BM
        hidden_BM = 1 + (share_BM * count_B1).floor().long().clamp(max=(count_B1 - 1).clamp(min=0))
        hidden_BML = (frame.order(draws) < hidden_BM[..., None]) & frame.scored_BL[:, None]
        return frame.views(hidden_BML, factor_BML=(count_B1 / hidden_BM)[..., None])
    time_BM = frame.noise("time", m_1M)
    if draw == "ladder":
        if not 0 <= start < 1:
            raise RecipeError(f"estimator.start: {start} must lie in [0, 1).")
        number, of = inner_step
        time_BM = start + (1 - start) * time_BM
        time_BM = time_BM + (1 - time_BM) * (number / (of - 1) if of > 1 else 0.0)
    hidden_BML = bernoulli(frame, time_BM)
    factor_BML = 1 / time_BM[..., None] if draw == "bernoulli" else torch.ones_like(time_BM)[..., None]
    return frame.views(hidden_BML, factor_BML=factor_BML)


def bernoulli(frame: Frame, time_BM: Tensor) -> Tensor:
    """Return `hidden_BML`: each scored token with probability `time_BM`."""
    position = torch.arange(frame.trajectory.canvas, device=time_BM.device).view(1, 1, -1)
    noise_BML = frame.noise("hide", frame.draws(time_BM.shape[1])[..., None], position)
    return (noise_BML < time_BM[..., None]) & frame.scored_BL[:, None]


@estimator.register
def coupled(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    low: float = 0.2,
    high: float = 0.8,
    normalised: bool = False,
    tokens: Tokens = "until_eos",
) -> Views:
    """coupled-GRPO's score of a token: 1/2 [f(all masked) + f(S)/P(in S)], S or its complement (A3; A0.1, E4b).

    S hides each token with probability rho ~ U(`low`, `high`). Three forwards. In expectation 1/2 f(all) + E f(S),
    about 1.5 log-probs (P12); `normalised` counts the second term 1/2 as well, so that the score is one log-prob.
    """
    if not 0 < low <= high < 1:
        raise RecipeError(f"estimator.low, high: {low}, {high} must satisfy 0 < low <= high < 1.")
    frame = Frame.of(trajectory, tokens, rng)
    rho_B1 = low + (high - low) * frame.noise("rho", frame.draws(1))
    chosen_BL = bernoulli(frame, rho_B1)[:, 0]
    rest_BL = frame.scored_BL & ~chosen_BL
    share_B2 = torch.cat([rho_B1, 1 - rho_B1], dim=1)
    pair_B2 = torch.full_like(share_B2, 0.5) if normalised else 0.5 / share_B2
    factor_B31 = torch.cat([torch.full_like(rho_B1, 0.5), pair_B2], dim=1)[..., None]
    hidden_B3L = torch.stack([frame.scored_BL, chosen_BL, rest_BL], dim=1)
    return frame.views(hidden_B3L, factor_BML=factor_B31, sample_M=torch.zeros(3, dtype=torch.long))


@estimator.register
def antithetic(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    draws: int = 2,
    tokens: Tokens = "until_eos",
) -> Views:
    """ELBO of pairs: k ~ U{0..L} tokens S, counted (L+1)/k, and the others, counted (L+1)/(L-k) (ESPO; A0.1, E4a).

    The mean of the two is unbiased, and every token is scored once a draw. k is stratified over the draws. Two forwards
    a draw.
    """
    if draws < 1:
        raise RecipeError(f"estimator.draws: {draws} must be at least 1.")
    frame = Frame.of(trajectory, tokens, rng)
    count_B1, m_1M = frame.count_B[:, None], frame.draws(draws)
    share_BM = (frame.noise("count", torch.zeros_like(m_1M)) + m_1M / draws) % 1
    hidden_BM = (share_BM * (count_B1 + 1)).floor().long().clamp(max=count_B1)
    first_BML = (frame.order(draws) < hidden_BM[..., None]) & frame.scored_BL[:, None]
    both_BML = torch.cat([first_BML, frame.scored_BL[:, None] & ~first_BML], dim=1)
    # An empty side has nothing that its factor could count.
    factor_BM = 0.5 * (count_B1 + 1) / torch.cat([hidden_BM, count_B1 - hidden_BM], dim=1).clamp(min=1)
    return frame.views(both_BML, factor_BML=factor_BM[..., None], sample_M=m_1M[0].repeat(2), draws=draws)


# How many canvases of a rollout each scores; see `most_canvases`.
fully_masked.canvases = lambda knobs, steps, length: 1  # type: ignore[attr-defined]
random_mask.canvases = lambda knobs, steps, length: knobs["draws"]  # type: ignore[attr-defined]
coupled.canvases = lambda knobs, steps, length: 3  # type: ignore[attr-defined]
antithetic.canvases = lambda knobs, steps, length: 2 * knobs["draws"]  # type: ignore[attr-defined]
