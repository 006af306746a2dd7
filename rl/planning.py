"""Training an unmasking policy: which of its steps are scored, the loss on them, and what the sampler is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..policies.planner import Planner, fingerprint_of
from ..recipes.registry import RecipeError
from ..rollouts.noise import uniform
from ..rollouts.planned import Acting, Expert, asks, check_remasking
from ..rollouts.sampler import Sampler
from ..rollouts.state import State
from ..rollouts.traits import bare, knobs_of
from ..rollouts.trajectory import GIVEN, Trajectory
from ..rollouts.worker import RolloutBatch
from .credit import Credit
from .distributed import gather_objects, total
from .losses import NonFiniteError, require_bounded
from .planchecks import check_choices
from .planscores import final_labels, step_scores

STEP_FIELDS = ("row_N", "step_N", "advantage_N", "expert_N", "old_N", "label_NL")


@dataclass(frozen=True)
class StepPlan:
    """N steps of a planner's rollouts, fixed for the inner steps on a batch; everything else is in the trajectory.

    `advantage_N` is the rollout's, `expert_N` marks steps that an expert chose, `old_N` the log-probability that ratios
    divide by, `label_NL` the labels of a warm start (no columns: none). `mass` is the number of the planner's own steps
    and `cloned` that of the expert's, over all ranks; `cloning` is the weight of the latter, `imitates` says that they
    are all there is.
    """

    trajectory: Trajectory
    row_N: Tensor
    step_N: Tensor
    advantage_N: Tensor
    expert_N: Tensor
    old_N: Tensor
    label_NL: Tensor
    mass: float
    cloned: float
    cloning: float
    imitates: bool

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the trajectory as named tensors, for a checkpoint."""
        numbers = torch.tensor([self.mass, self.cloned, self.cloning, float(self.imitates)], dtype=torch.float64)
        return {name: getattr(self, name) for name in STEP_FIELDS} | {"numbers": numbers}

    @staticmethod
    def from_tensors(trajectory: Trajectory, sampler: Sampler, saved: dict[str, Tensor]) -> StepPlan:
        """Return the plan that `tensors` saved."""
        mass, cloned, cloning, imitates = saved["numbers"].tolist()
        steps = {name: saved[name] for name in STEP_FIELDS}
        return StepPlan(trajectory, **steps, mass=mass, cloned=cloned, cloning=cloning, imitates=bool(imitates))


class Learner(nn.Module):
    """What is optimised and checkpointed: the network, and the trade-off that dual ascent has reached."""

    price: Tensor

    def __init__(self, network: nn.Module, alpha: float) -> None:
        super().__init__()
        self.network = network.train().requires_grad_(True)
        self.register_buffer("price", torch.tensor(alpha, dtype=torch.float64))


@dataclass
class Planning:
    """The planner's objective, with the interface of `Objective`; the denoiser is frozen and never called.

    Over the planner's own steps n of all ranks, rho the ratio of the whole choice now and then:

        loss = 1/N sum_n surrogate(log rho_n, A_n) - w/E sum_e (A_e)+ log p(u_e) - entropy/N sum_n H_n

    where e are the steps of expert rollouts (`cloning`; with `mixture` they join the first sum, both probabilities
    mixed with a point mass: arXiv 2512.09106, appendix, G of G + E). An `order` adds `pull`/N sum_n of the divergence
    from it (UPO). In the first `warmup` batches the expert drives all and the loss is -1/E sum_e log p(u_e);
    with `labels` final, of labels that say which drafts are what the rollout ends with (Learn2PD). `alpha` [low, high]
    is drawn log-uniformly a group and told to the policy, one number for all where both are equal; with
    `target_nfe` it follows from the rollouts by dual ascent. `by_alpha` makes the warm-up one in speeds: each of its
    rollouts is told an alpha of its own, and the log-odds of its threshold lie as far between those of the `levels` as
    log alpha in its range.
    """

    planner: Planner
    surrogate: Callable[..., Tensor]
    speed: Callable[..., Tensor]
    group: int
    seed: int = 0
    alpha: tuple[float, float] = (1.0, 1.0)
    target_nfe: float | None = None
    dual_rate: float = 0.1
    levels: tuple[float, ...] = ()
    block: int | None = None
    warmup: int = 0
    by_alpha: bool = False
    labels: str = "choices"
    steering: str = "none"
    weight: float = 1.0
    anneal: int = 0
    order: Callable[..., Tensor] | None = None
    pull: float = 0.0
    entropy: float = 0.0
    chunk: int = 64
    ratio_limit: float | None = 1.0e4
    # As an Objective: ratios divide by the rollout's own log-probs, nothing is drawn anew, and there is no reference.
    beta: float = field(default=0.0, init=False)
    old: str = field(default="rollout", init=False)
    redraw: bool = field(default=False, init=False)
    batch: int = field(default=0, init=False)
    temperature: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_choices(self)
        self.learner = Learner(self.planner.network, self.alpha[1])
        self.surrogate(torch.zeros(1), torch.ones(1))

    @property
    def experts(self) -> int:
        """Expert rollouts in each group, after the warm-up."""
        return len(self.levels) if self.steering != "none" else 0

    @property
    def needs_drafts(self) -> bool:
        """Whether rollouts must record what each step drew, for the labels of the warm start."""
        return self.warmup > 0 and self.labels == "final"

    def acting(self, sampler: Sampler) -> Sampler:
        """Return a training sampler: the planner in its part, told each group's trade-off; what it saw is recorded."""
        single = self.planner.spec.distribution == "categorical"
        expert = Expert(partial(_level, self), self.block, single) if self.levels else None
        # The same one in the loss: a policy that acts at one temperature and is scored at another is not that policy.
        told, slot = ("schedule", "schedule") if self.planner.spec.sizes else ("score", "selection")
        self.temperature = knobs_of(getattr(sampler, told)).get("temperature", 1.0)
        if not sampler.plans or knobs_of(getattr(sampler, slot)).get("decide", "sample") != "sample":
            raise RecipeError(
                f"rollout.sampler.{slot}: a planner learns from what it draws; use planned, decide: sample."
            )
        check_remasking(sampler, self.planner.spec)
        act = Acting(self.planner, lambda state: self.alphas(state.rollout_id_A, state.step), expert)
        return replace(bound(sampler, act), keeps_features=True)

    def evaluating(self, sampler: Sampler) -> Sampler:
        """Return an evaluation sampler: the planner in the part that asks for one and names no file, told its alpha."""
        slot = asks(sampler)
        if slot is None or knobs_of(getattr(sampler, slot)).get("path") is not None:
            return sampler
        alpha = knobs_of(getattr(sampler, slot)).get("alpha", 1.0)
        act = Acting(self.planner, lambda state: torch.full_like(state.committed_AL[:, 0], alpha))
        return bound(sampler, act)

    def alphas(self, rollout_id_B: Tensor, batch: int) -> Tensor:
        """Return the trade-off of each rollout of a batch, the same in a group but for a warm-up `by_alpha`."""
        low, high = self.alpha
        if low == high:
            return torch.full(rollout_id_B.shape, float(self.learner.price), device=rollout_id_B.device)
        return (math.log(low) + _share(self, rollout_id_B, batch) * math.log(high / low)).exp().float()

    def credit(self, batch: RolloutBatch, number: int) -> Tensor:
        """Return the rewards with speed in them, and move the trade-off where calls have a target."""
        self.batch, trajectory = number, batch.trajectory
        alpha_B = self.alphas(trajectory.rollout_id_B, number).cpu()
        length_B = (trajectory.source_BL != GIVEN).sum(dim=1)
        reward_B = self.speed(
            batch.rewards.total_B, trajectory.steps_B, length_B, alpha_B.to(batch.rewards.total_B.dtype)
        )
        if self.target_nfe is not None and number >= self.warmup:
            parts = gather_objects((int(trajectory.steps_B.sum()), len(trajectory)))
            calls = sum(steps for steps, _ in parts) / sum(rows for _, rows in parts)
            price = float(self.learner.price) + self.dual_rate * math.log(calls / self.target_nfe)
            self.learner.price.fill_(max(0.0, price))
        return reward_B

    @torch.no_grad()
    def plan(
        self,
        policy: Any,
        reference: Any,
        trajectory: Trajectory,
        advantage: Credit | Tensor,
        *,
        rng: torch.Generator | None,
        sampler: Sampler,
        inner: tuple[int, int] = (0, 1),
    ) -> StepPlan:
        """Return the plan of a batch; arguments as `Objective.plan`. Every rank must call this."""
        assert trajectory.candidate_BSL is not None and trajectory.choice_logprob_BS is not None
        advantage_B = advantage.value if isinstance(advantage, Credit) else advantage
        imitates = self.batch < self.warmup
        place_B = trajectory.rollout_id_B % self.group
        expert_B = place_B >= (0 if imitates else self.group - self.experts)
        applies_B = ~advantage_B.isnan() if not imitates else torch.ones_like(expert_B)
        advantage_B = advantage_B.nan_to_num(0.0)
        row_N, step_N = (trajectory.candidate_BSL.any(dim=2) & applies_B[:, None]).nonzero(as_tuple=True)
        expert_N, old_N = expert_B[row_N], trajectory.choice_logprob_BS[row_N, step_N]
        own_N = torch.ones_like(expert_N) if self.steering == "mixture" and not imitates else ~expert_N
        kept_N = (own_N & (advantage_B[row_N] != 0)) | (expert_N & (imitates | (advantage_B[row_N] > 0)))
        if self.entropy or self.order is not None:
            kept_N |= own_N
        # Steps with equally many open positions share a chunk: the network works on the most of any of its rows.
        order_N = trajectory.candidate_BSL.sum(dim=2)[row_N, step_N].argsort(stable=True)
        kept_N = order_N[kept_N[order_N]]
        row_N, step_N, labelled = row_N[kept_N], step_N[kept_N], imitates and self.labels == "final"
        label_NL = final_labels(trajectory, row_N, step_N) if labelled else row_N.new_zeros(len(row_N), 0)
        faded = max(0.0, 1 - (self.batch - self.warmup) / self.anneal) if self.anneal else 1.0
        return StepPlan(
            trajectory.without_drafts(),
            row_N=row_N,
            step_N=step_N,
            advantage_N=advantage_B[row_N],
            expert_N=expert_N[kept_N],
            old_N=old_N[kept_N],
            label_NL=label_NL,
            mass=total(float(own_N.sum())),
            cloned=total(float(expert_N.sum())),
            cloning=1.0 if imitates else self.weight * faded if self.steering == "cloning" else 0.0,
            imitates=imitates,
        )

    def backward(self, policy: Any, plan: StepPlan) -> dict[str, float]:
        """Add this rank's share of the gradient to the network's `.grad` and return statistics; no denoiser is called.

        Raises NonFiniteError or RatioError before the backward of a chunk whose loss is not finite, or one of whose
        ratios exceeds the limit. Every rank must call this.
        """
        sums = dict.fromkeys(("loss", "entropy", "ratio_max", "logprob"), 0.0)
        for start in range(0, len(plan.row_N), self.chunk):
            part = slice(start, start + self.chunk)
            logprob_N, entropy_N, pull_N = step_scores(self, plan, part)
            loss, log_ratio_N = self._loss(plan, part, logprob_N, self.pull * pull_N - self.entropy * entropy_N)
            if not bool(loss.isfinite()):
                rollout = int(plan.trajectory.rollout_id_B[plan.row_N[part][0]])
                raise NonFiniteError(
                    f"rollout {rollout}: the planner's loss is {loss.item()}; nothing was stepped. Lower optim.lr and "
                    "resume from the last checkpoint."
                )
            if self.ratio_limit is not None:
                require_bounded(log_ratio_N, plan.trajectory.rollout_id_B[plan.row_N[part]], self.ratio_limit)
            loss.backward()
            sums["loss"] += loss.item()
            sums["entropy"] += entropy_N.detach().sum().item()
            sums["logprob"] += logprob_N.detach().sum().item()
            if len(log_ratio_N):
                sums["ratio_max"] = max(sums["ratio_max"], (log_ratio_N.exp() - 1).abs().max().item())
        steps = total(float(len(plan.row_N)))
        low, high = self.alpha
        return {
            "loss": total(sums["loss"]),
            "entropy": total(sums["entropy"]) / max(steps, 1.0),
            "choice_logprob": total(sums["logprob"]) / max(steps, 1.0),
            "ratio_max_deviation": max(gather_objects(sums["ratio_max"])),
            "steps": steps,
            **({"alpha": float(self.learner.price)} if low == high else {}),
        }

    def _loss(self, plan: StepPlan, part: slice, logprob_N: Tensor, extra_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return this part's share of the loss with `extra_N` a step, and the log-ratios (an expert's: 0)."""
        expert_N, advantage_N, old_N = plan.expert_N[part], plan.advantage_N[part], plan.old_N[part]
        ratio_N = expert_N.new_zeros(len(expert_N), dtype=logprob_N.dtype)
        loss = logprob_N.sum() * 0.0
        if plan.cloning:
            gain_N = torch.ones_like(advantage_N) if plan.imitates else advantage_N.clamp(min=0.0)
            cloned_N = torch.where(expert_N, gain_N * logprob_N, 0.0)
            loss = loss - plan.cloning * cloned_N.sum() / max(plan.cloned, 1.0)
        if plan.imitates:
            return loss, ratio_N
        own_N = ~expert_N
        ratio_N = logprob_N - old_N
        if self.steering == "mixture":
            share, own_N = self.experts / self.group, torch.ones_like(own_N)
            ratio_N = torch.where(expert_N, _mixed(logprob_N, share) - _mixed(old_N, share), ratio_N)
        shares_N = self.surrogate(ratio_N, advantage_N) + extra_N
        loss = loss + torch.where(own_N, shares_N, 0.0).sum() / max(plan.mass, 1.0)
        return loss, torch.where(own_N, ratio_N, 0.0).detach()

    def save(self, directory: str | Path, denoiser: Any = None, **notes: Any) -> Path:
        """Write the planner with its trade-off, and the fingerprint of the `denoiser` it belongs to by now."""
        planner = self.planner if denoiser is None else replace(self.planner, fingerprint=fingerprint_of(denoiser))
        return planner.save(directory, alpha=list(self.alpha), price=float(self.learner.price), **notes)


def thresholds(planning: Planning, rollout_id_B: Tensor, batch: int) -> Tensor:
    """Return the threshold of each rollout of a warm-up: the levels in turn in a group, or `by_alpha`."""
    level_E = torch.tensor(planning.levels, device=rollout_id_B.device)
    if not planning.by_alpha:
        return level_E[rollout_id_B % planning.group % len(level_E)]
    place_B = _share(planning, rollout_id_B, batch).float() * (len(level_E) - 1)
    below_B = place_B.long()
    above_B = (below_B + 1).clamp(max=len(level_E) - 1)
    return torch.lerp(level_E.logit()[below_B], level_E.logit()[above_B], place_B - below_B).sigmoid()


def _share(planning: Planning, rollout_id_B: Tensor, batch: int) -> Tensor:
    """Return where in its range the trade-off of each rollout lies, by its logarithm."""
    # Advantages compare the rollouts of a group at one trade-off; imitation compares none.
    alone = planning.by_alpha and 0 <= batch < planning.warmup
    return uniform(planning.seed, "alpha", batch, rollout_id_B if alone else rollout_id_B // planning.group)


def _level(planning: Planning, state: State) -> Tensor:
    """Return the threshold of the rows that the expert drives, NaN elsewhere; an evaluation has none."""
    if 0 <= state.step < planning.warmup:
        return thresholds(planning, state.rollout_id_A, state.step)
    table_E = torch.tensor(planning.levels, device=state.step_A.device)
    place_A = state.rollout_id_A % planning.group
    first = planning.group - planning.experts
    own_A = place_A < first if state.step >= 0 else torch.ones_like(place_A, dtype=torch.bool)
    return torch.where(own_A, torch.nan, table_E[(place_A - first).clamp(min=0) % len(planning.levels)])


def _mixed(logprob_N: Tensor, share: float) -> Tensor:
    """Return log[(1 - e) p + e] with e the share of experts, the published behaviour of an expert's step."""
    point_N = torch.full_like(logprob_N, math.log(share))
    return torch.logaddexp(logprob_N + math.log(1 - share), point_N)


def bound(sampler: Sampler, act: Acting) -> Sampler:
    """Return a sampler whose score, or schedule, asks this planner; RecipeError where it asks none of its kind."""
    slot, name = ("schedule", "planned") if act.planner.spec.sizes else ("score", "planner")
    if asks(sampler) != slot:
        raise RecipeError(f"rollout.sampler.{slot}: a run that trains a planner rolls out with it; use {slot} {name}.")
    part = getattr(sampler, slot)
    kept = {name: value for name, value in knobs_of(part).items() if name not in ("path", "acting")}
    return replace(sampler, **{slot: partial(bare(part), acting=act, **kept)})  # type: ignore[arg-type]
