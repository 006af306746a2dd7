"""How far the rollout's log-probs lie from those that the trainer recomputes, step by step."""

from __future__ import annotations

from typing import Any

import torch

from ..rollouts.sampler import Sampler
from .distributed import gather_objects
from .joint import AnyPlan, JointPlan
from .planning import StepPlan


@torch.no_grad()
def mismatch_by_step(plan: AnyPlan, sampler: Sampler, old: str) -> dict[str, Any]:
    """Return the gap log mu - log pi_old of the scored tokens of all ranks, nats; every rank must call this.

    Empty for a planner's plan, for a sampler that draws from the policy itself, and where `old` says that nothing was
    recomputed.

    mu is the rollout's probability of a token, pi_old the recomputed one: under mu the mean is KL(mu || pi_old) a token
    (samplers.md section 4.1). `mismatch/kl` and `mismatch/max` are mean and largest gap over all tokens,
    `mismatch/kl_by_step` and `mismatch/max_by_step` those of each denoising step, None where no token was scored.
    """
    plan = plan.tokens if isinstance(plan, JointPlan) else plan
    if isinstance(plan, StepPlan) or sampler.mismatch is None or old != "recompute":
        return {}
    views, tokens = plan.views, len(plan.weight_K)
    gap_K = (plan.behaviour_A - plan.old_A)[:tokens].double()
    step_K = views.step_N[views.view_K]
    steps = int(step_K.max()) + 1 if tokens else 0
    count_S = torch.bincount(step_K, minlength=steps)
    sum_S = gap_K.new_zeros(steps).index_add(0, step_K, gap_K)
    max_S = gap_K.new_full((steps,), -torch.inf).scatter_reduce(0, step_K, gap_K, "amax")
    ranks = gather_objects((count_S.tolist(), sum_S.tolist(), max_S.tolist()))
    by_step: list[tuple[int, float, float]] = []
    for step in range(max(len(counts) for counts, _, _ in ranks)):
        seen = [(c[step], s[step], m[step]) for c, s, m in ranks if step < len(c)]
        by_step.append((sum(x[0] for x in seen), sum(x[1] for x in seen), max(x[2] for x in seen)))
    total = sum(count for count, _, _ in by_step)
    return {
        "mismatch/kl": sum(value for _, value, _ in by_step) / total if total else 0.0,
        "mismatch/max": max((value for count, _, value in by_step if count), default=0.0),
        "mismatch/kl_by_step": [value / count if count else None for count, value, _ in by_step],
        "mismatch/max_by_step": [value if count else None for count, _, value in by_step],
    }
