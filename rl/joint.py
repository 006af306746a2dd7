"""Joint training: the denoiser learns from truth, its planner from truth and speed, on the same recorded steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..policies.planner import FILE, read_planner
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from ..rollouts.worker import RolloutBatch, RolloutWorker
from .config import UnmaskConfig
from .credit import Credit
from .crediting import credited
from .defaults import default_objective, trainable
from .objective import Objective
from .optimizers import Together, build_optimizer
from .plan import Plan
from .planning import Planning, StepPlan

TOKENS, POSITIONS = "tokens.", "positions."  # how a checkpoint names the tensors of the two plans


@dataclass(frozen=True)
class JointCredit:
    """The credit of drawn tokens and that of a planner's choices."""

    tokens: Credit
    positions: Credit

    def to(self, device: torch.device | str) -> JointCredit:
        """Return the credit on `device`."""
        return JointCredit(self.tokens.to(device), self.positions.to(device))


@dataclass(frozen=True)
class JointPlan:
    """The two plans of one batch: views on which the denoiser's tokens are scored, and the planner's steps."""

    tokens: Plan
    positions: StepPlan

    @property
    def trajectory(self) -> Trajectory:
        """The rollouts."""
        return self.tokens.trajectory

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the trajectory as named tensors, for a checkpoint."""
        tokens = {TOKENS + name: value for name, value in self.tokens.tensors().items()}
        return tokens | {POSITIONS + name: value for name, value in self.positions.tensors().items()}

    @staticmethod
    def from_tensors(trajectory: Trajectory, sampler: Sampler, saved: dict[str, Tensor]) -> JointPlan:
        """Return the plan that `tensors` saved."""
        tokens, positions = (
            {name.removeprefix(mark): value for name, value in saved.items() if name.startswith(mark)}
            for mark in (TOKENS, POSITIONS)
        )
        return JointPlan(
            Plan.from_tensors(trajectory, sampler, tokens), StepPlan.from_tensors(trajectory, sampler, positions)
        )


AnyPlan = Plan | StepPlan | JointPlan


@dataclass
class Joint:
    """A denoiser's objective and its planner's, with the interface of `Objective`: the gradient of both in one step.

    A step opens the positions u with tokens y, of probability pi(u | features) prod_{i in u} p(y_i | canvas). `tokens`
    moves p by the advantages of the rewards as they are, `planning` moves pi by those with speed in them:

        loss = tokens' loss(log p(y_i | canvas), A of r) + planning's loss(log pi(u | features), A of r and speed)

    What the planner saw follows from the denoiser's weights and is data in both terms: each part is the policy gradient
    of its own choices, the other's being environment. `lr` is the planner's learning rate (None: that of the denoiser).
    """

    tokens: Objective
    planning: Planning
    lr: float | None = None

    @property
    def beta(self) -> float:
        """The weight of the denoiser's divergence from its reference; the planner has none."""
        return self.tokens.beta

    @property
    def old(self) -> str:
        """Where the denominator of the tokens' ratio comes from."""
        return self.tokens.old

    @property
    def redraw(self) -> bool:
        """Whether the estimator draws its canvases anew for each inner step."""
        return self.tokens.redraw

    @property
    def estimator(self) -> Callable[..., Any]:
        """The estimator of the tokens' views."""
        return self.tokens.estimator

    def plan(
        self,
        policy: Any,
        reference: Any,
        trajectory: Trajectory,
        advantage: JointCredit,
        *,
        rng: torch.Generator | None,
        sampler: Sampler,
        inner: tuple[int, int] = (0, 1),
    ) -> JointPlan:
        """Return both plans of a batch; arguments as `Objective.plan`. Every rank must call this."""
        tokens = self.tokens.plan(
            policy, reference, trajectory, advantage.tokens, rng=rng, sampler=sampler, inner=inner
        )
        positions = self.planning.plan(
            policy, reference, tokens.trajectory, advantage.positions, rng=rng, sampler=sampler, inner=inner
        )
        return JointPlan(tokens, positions)

    def backward(self, policy: Any, plan: JointPlan) -> dict[str, float]:
        """Add this rank's share of both gradients and return statistics, the planner's as `planner_NAME`.

        The planner's gradient is cleared first: `Trainer` clears that of its own model alone. Every rank must call
        this. Raises NonFiniteError as the two parts do.
        """
        self.planning.learner.zero_grad()
        drawn = self.tokens.backward(policy, plan.tokens)
        chosen = self.planning.backward(policy, plan.positions)
        named = {f"planner_{name}": value for name, value in chosen.items()}
        return drawn | named | {"loss": drawn["loss"] + chosen["loss"]}

    def clip(self, most: float) -> float:
        """Clip the planner's gradient at the norm `most` (0: not at all) and return its norm; Trainer clips its own."""
        return nn.utils.clip_grad_norm_(self.planning.learner.parameters(), most or math.inf).item()

    def restore(self, directory: Path) -> None:
        """Take a checkpoint's planner, its weights and the trade-off it had reached; Trainer reads its own model."""
        about, state = read_planner(directory / FILE)
        self.planning.planner.network.load_state_dict(state)
        self.planning.learner.price.fill_(about["notes"]["price"])

    def with_planner(self, optimizer: torch.optim.Optimizer, knobs: dict[str, Any]) -> torch.optim.Optimizer:
        """Return the denoiser's optimizer, made with `knobs`, and the planner's AdamW at `lr`, behind one interface."""
        knobs = {**knobs, "name": "adamw", "lr": self.lr or knobs["lr"]}
        return Together([optimizer, build_optimizer(self.planning.learner.named_parameters(), **knobs)])


def settled(
    objective: Objective | Joint | None,
    planning: Planning | None,
    args: UnmaskConfig,
    training: Sampler,
    evaluation: Sampler,
) -> tuple[Objective | Joint | Planning, Planning | None, Sampler, Sampler]:
    """Return what is minimised, the planner's part of it, and both samplers with the planner in them.

    Raises RecipeError where the rollouts of a training sampler have no log-probability of what is trained.
    """
    joint = objective if isinstance(objective, Joint) else None
    planning = planning if joint is None else joint.planning
    if planning is not None:
        training, evaluation = planning.acting(training), planning.evaluating(evaluation)
    if planning is None or joint is not None:
        training = trainable(training)
    return joint or planning or objective or default_objective(args, training), planning, training, evaluation


def learned_by(objective: Objective | Joint | Planning, denoiser: Any) -> tuple[nn.Module, ...]:
    """Return what is optimised: the denoiser, a planner, or both; the first is what `Trainer` calls its model."""
    if isinstance(objective, Joint):
        return denoiser.model, objective.planning.learner
    return (objective.learner if isinstance(objective, Planning) else denoiser.model,)


def credit_batch(
    objective: Objective | Joint | Planning,
    worker: RolloutWorker,
    batch: RolloutBatch,
    advantage: Callable[..., Tensor],
    number: int,
) -> tuple[RolloutBatch, Credit | JointCredit]:
    """Return batch `number` with its advantages, and the credit that the objective reads.

    In joint training the batch's are those of the tokens: rewards without speed.
    """
    if isinstance(objective, Planning):
        return credited(worker, batch, advantage, objective.credit(batch, number))
    batch, credit = credited(worker, batch, advantage)
    if not isinstance(objective, Joint):
        return batch, credit
    paid_B = objective.planning.credit(batch, number)
    return batch, JointCredit(credit, Credit(advantage(paid_B, batch.group_B)))
