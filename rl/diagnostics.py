"""Numbers that say whether an update is sound: ratios, clipping, mismatch, divergence, entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import gather_objects
from .losses import LossFunction
from .plan import Plan
from .replay import Scores

QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}
GAP_QUANTILES = {"mismatch_p50": 0.5, "mismatch_p99": 0.99}


@torch.no_grad()
def diagnose(function: LossFunction, plan: Plan, scores: Scores, *, recomputed: bool) -> dict[str, float]:
    """Return statistics of an update over all ranks; every rank must call this, and gets the same.

    `loss`; `ratio_max_deviation` (max |ratio - 1| over units) and quantiles of the ratio; `clip_fraction` (units of
    non-zero advantage whose ratio gets no gradient); `kl` (weighted mean of the divergence from the reference, 0
    without); `kl_old` (mean of k3 from the old policy); `mismatch_mean`, `mismatch_max`, `mismatch_p50` and
    `mismatch_p99` (|training - rollout| log-prob of a token, nats: of the recomputed old log-probs where there are any,
    else of this pass, which then includes what earlier inner steps changed); `entropy` (mean, nats); `coefficient_max`
    (largest |dloss / dlogprob|); `tokens`, `views` and `rollouts` that were scored, and the `mass`.
    """
    tokens = len(plan.weight_K)
    coefficient_A = function.coefficients(plan, scores.logprob_A) if tokens else scores.logprob_A
    loss = function(plan, scores.logprob_A)
    trained_A = plan.old_A if recomputed else scores.logprob_A
    gap_K = (trained_A - plan.behaviour_A)[:tokens].abs()
    moved_K = (scores.logprob_A - plan.old_A)[:tokens]
    clipped_U, eligible_U = _clipped(function, loss.log_ratio_U, loss.advantage_U)
    divergence = 0.0
    if loss.divergence_X is not None:
        weight_X = loss.weight_U if function.over == "unit" else plan.divergence_weight_K
        divergence = _sum(weight_X * loss.divergence_X)
    sums = {
        "loss": float(loss.value),
        "clipped": _sum(clipped_U),
        "eligible": _sum(eligible_U),
        "divergence": divergence,
        "kl_old": _sum(torch.expm1(moved_K) - moved_K),
        "mismatch": _sum(gap_K),
        "entropy": _sum(scores.entropy_K),
        "tokens": tokens,
        "views": len(plan.views),
        "rollouts": len(torch.unique(plan.views.row_N)),
    }
    maxima = {"mismatch_max": _max(gap_K), "coefficient_max": _max(coefficient_A.abs())}
    return _merge(gather_objects((sums, maxima, loss.log_ratio_U.double().cpu(), gap_K.double().cpu())), plan.mass)


def _clipped(function: LossFunction, log_ratio_U: Tensor, advantage_U: Tensor) -> tuple[Tensor, Tensor]:
    """Return which units have a ratio that the surrogate does not push on, and which could (advantage not 0)."""
    with torch.enable_grad():
        leaf_U = log_ratio_U.detach().requires_grad_()
        (slope_U,) = torch.autograd.grad(function.surrogate(leaf_U, advantage_U).sum(), leaf_U)
    eligible_U = advantage_U != 0
    return eligible_U & (slope_U == 0), eligible_U


def _merge(ranks: list[tuple[dict[str, float], dict[str, float], Tensor, Tensor]], mass: float) -> dict[str, float]:
    """Return the statistics of all ranks as one dictionary."""
    sums = {name: sum(rank[0][name] for rank in ranks) for name in ranks[0][0]}
    maxima = {name: max(rank[1][name] for rank in ranks) for name in ranks[0][1]}
    ratio = torch.cat([rank[2] for rank in ranks]).exp()
    tokens = max(sums["tokens"], 1)
    quantiles = {name: float(ratio.quantile(q)) if len(ratio) else 1.0 for name, q in QUANTILES.items()}
    gap = torch.cat([rank[3] for rank in ranks])
    quantiles |= {name: float(gap.quantile(q)) if len(gap) else 0.0 for name, q in GAP_QUANTILES.items()}
    return {
        "loss": sums["loss"],
        "ratio_max_deviation": _max((ratio - 1).abs()),
        **quantiles,
        "clip_fraction": sums["clipped"] / max(sums["eligible"], 1),
        "kl": sums["divergence"] / mass if mass else 0.0,
        "kl_old": sums["kl_old"] / tokens,
        "mismatch_mean": sums["mismatch"] / tokens,
        "entropy": sums["entropy"] / tokens,
        **maxima,
        "tokens": sums["tokens"],
        "views": sums["views"],
        "rollouts": sums["rollouts"],
        "mass": mass,
    }


def _sum(value: Tensor) -> float:
    return float(value.double().sum())


def _max(value: Tensor) -> float:
    return float(value.max()) if value.numel() else 0.0
