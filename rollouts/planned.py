"""An unmasking policy in a sampler: the score that asks it, and the selection that draws what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..policies.planner import Planner, PlannerSpec, fingerprint_of, load_planner
from ..policies.planner_distributions import Distribution, Draw, Noise
from ..recipes.registry import SLOTS, RecipeError
from .features import NEEDS, keep_decided, observe
from .measures import Statistics
from .ranking import best, rank
from .schedules import Quota, first_block
from .state import Record, State
from .traits import bare, knobs_of, traits

WITHOUT = "a planner with distribution remasking takes tokens back; set sampler.remasking to planned."
LENGTHS = "this planner chooses lengths of blocks; use schedule planned, and score confidence, for one."
POSITIONS = "this planner chooses positions; use score planner with selection planned, and a schedule of blocks."
WITH = "this planner takes no tokens back; drop sampler.remasking, or train one with distribution remasking."


@dataclass(frozen=True)
class Expert:
    """Rows that a threshold rule drives: those where `level(state)` is no NaN, in blocks of `block` (None: none).

    `single`: only the most confident position, for policies that choose one a step.
    """

    level: Callable[[State], Tensor]
    block: int | None = None
    single: bool = False

    def takes_over(self, state: State, draw: Draw) -> Draw:
        """Return the draw with the expert's choice in its rows: what reaches the level, at least the best."""
        assert state.statistics is not None and state.planned is not None
        level_A1 = self.level(state)[:, None]
        confidence_AL, window_AL = state.statistics.confidence, state.planned.candidate_AL
        if self.block is not None:
            window_AL = window_AL & first_block(window_AL, self.block, state)
        # In rows of the planner the level is NaN, which nothing reaches.
        chosen_AL = best(confidence_AL, window_AL)
        if not self.single:
            chosen_AL = chosen_AL | ((confidence_AL >= level_A1.log()) & window_AL)
        own_A1 = level_A1.isnan()
        key_AL = confidence_AL.to(draw.key_BL.dtype)
        return Draw(torch.where(own_A1, draw.chosen_BL, chosen_AL), torch.where(own_A1, draw.key_BL, key_AL))


@dataclass(frozen=True)
class Acting:
    """A planner in a rollout, as a trainer gives it: `alpha(state)` is the trade-off of each row."""

    planner: Planner
    alpha: Callable[[State], Tensor]
    expert: Expert | None = None


@dataclass
class Planned:
    """A step of a planner: what it saw and could open, its distribution, and the draw once there is one.

    `standing_AL` are the tokens that a planner that takes some back may take; what it draws of them is no part of the
    selection but of remasking `planned`. Of one that draws where blocks end, `end_A` are the ends (0: no block begins)
    and `past_AMD` what it saw of the blocks before.
    """

    feature_ALF: Tensor
    candidate_AL: Tensor
    distribution: Distribution
    acting: Acting
    standing_AL: Tensor | None = None
    draw: Draw | None = None
    end_A: Tensor | None = None
    past_AMD: Tensor | None = None


@SLOTS["score"].register
@traits(needs=NEEDS, open=True, history=True)
def planner(
    statistics: Statistics,
    position: Tensor,
    noise: Tensor,
    *,
    state: State,
    acting: Acting | None = None,
    path: str | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability with which a learned unmasking policy opens each position (arXiv 2512.09106).

    `path` is a trained planner's folder or its run's; a run that trains one needs none. `alpha` is the trade-off that
    the policy is told: higher is faster, where it was trained on several. `temperature` divides its logits. Selection
    `planned` draws from it; others take its score for a confidence.
    """
    check_knobs("score", alpha, temperature)
    acting = acting_of("score", state, acting, path, alpha)
    assert state.window_AL is not None
    network, spec = acting.planner, acting.planner.spec
    check_kind("score", spec)
    standing_AL = _standing(state) if spec.remasks else None
    feature_ALF = observe(state, spec.features, acting.alpha(state), standing_AL, hidden=spec.hidden)
    candidate_AL = state.window_AL
    if spec.shortlist:
        candidate_AL = candidate_AL & (rank(statistics.odds.masked_fill(~candidate_AL, -torch.inf)) < spec.shortlist)
    distribution = network.distribution(feature_ALF.float(), candidate_AL, standing_AL, temperature=temperature)
    state.planned = Planned(feature_ALF, candidate_AL, distribution, acting, standing_AL)
    return distribution.chance_BL


def _standing(state: State) -> Tensor:
    """Return the tokens of the schedule's region that may be taken back, all of them measured."""
    assert state.statistics is not None and state.quota is not None
    if state.statistics.current is None:
        raise RecipeError(f"sampler.remasking: {WITHOUT}")
    region_AL = state.quota.region_BL
    return state.stood_AL if region_AL is None else state.stood_AL & region_AL


def check_knobs(slot: str, alpha: float, temperature: float) -> None:
    """Raise RecipeError for knobs that no planner has a use for."""
    if not temperature > 0:
        raise RecipeError(f"{slot}.temperature: {temperature} must be above 0; for certain choices use decide: mode.")
    if alpha < 0:
        raise RecipeError(f"{slot}.alpha: {alpha} must be at least 0.")


def check_kind(slot: str, spec: PlannerSpec) -> None:
    """Raise RecipeError where a planner of positions is asked for lengths, or the other way round."""
    if spec.sizes != (slot == "schedule"):
        raise RecipeError(f"sampler.{slot}: {LENGTHS if spec.sizes else POSITIONS}")


def acting_of(slot: str, state: State, acting: Acting | None, path: str | None, alpha: float) -> Acting:
    """Return what a trainer gives, else the planner of a file, told one trade-off."""
    if acting is not None:
        return acting
    return Acting(_opened(slot, path, state.canvas_AL.device), lambda s: torch.full_like(s.committed_AL[:, 0], alpha))


@cache
def _opened(slot: str, path: str | None, device: torch.device) -> Planner:
    if path is None:
        name = "planned" if slot == "schedule" else "planner"
        raise RecipeError(f"{slot}.path: {slot} '{name}' needs a trained planner's folder, or that of its run.")
    found = load_planner(path)
    found.network.to(device)
    return found


@SLOTS["selection"].register
@traits(status="exact with order", plans=True)
def planned(score_BL: Tensor, quota: Quota, *, state: State, decide: Literal["sample", "mode"] = "sample") -> Tensor:
    """What score `planner` decides: a draw from its distribution, or its likeliest outcome (`mode`)."""
    return _draw(state, decide).chosen_BL


def _draw(state: State, decide: str) -> Draw:
    """Return the step's draw, made once."""
    step = state.planned
    if step is None:
        raise RecipeError("selection: 'planned' draws what a planner decides; use score planner with it.")
    if step.draw is None:
        step.draw = drawn(step.distribution, state, decide)
        if step.acting.expert is not None:
            step.draw = step.acting.expert.takes_over(state, step.draw)
    return step.draw


def drawn(distribution: Distribution, state: State, decide: str) -> Draw:
    """Return a draw with the step's own noise, or the likeliest outcome (`decide` mode)."""
    if decide == "mode":
        return distribution.mode()
    row_A = state.uniform("planner_row")[:, 0]
    return distribution.sample(Noise(state.uniform("planner_unit"), state.uniform("planner_order"), row_A))


def _keys(score_BL: Tensor, state: State, *, decide: str = "sample") -> Tensor:
    return _draw(state, decide).key_BL


planned.keys = _keys  # type: ignore[attr-defined]


def note_plan(record: Record, state: State, scored: Any, alive_A: Tensor, acts_A: Tensor, keeps: bool) -> None:
    """Record a planner's step: log-probability of its choice and, to train on, what it saw; a forced step is none."""
    step = state.planned
    assert step is not None
    chosen_AL, candidate_AL = scored.chosen_AL, step.candidate_AL
    if step.standing_AL is not None and step.draw is not None:
        # What is taken back is chosen too: the canvas says which candidate would be opened and which taken back.
        chosen_AL = chosen_AL | (step.draw.chosen_BL & step.standing_AL)
        candidate_AL = candidate_AL | step.standing_AL
    if step.end_A is not None and step.draw is not None:
        # Where the block ends is chosen, and nothing else of the step.
        if step.past_AMD is not None:
            keep_decided(state, step.acting.planner.spec.hidden, chosen_AL)
        chosen_AL = step.draw.chosen_BL
        record.note(alive_A, "ends", torch.where(acts_A, step.end_A, 0))
    logprob_A = step.distribution.log_prob(chosen_AL, scored.rank_AL)
    record.note(alive_A, "choice_logprobs", torch.where(acts_A, logprob_A, 0.0))
    if keeps:
        record.note(alive_A, "features", step.feature_ALF)
        record.note(alive_A, "candidates", candidate_AL & acts_A[:, None])
        if step.past_AMD is not None:
            record.note(alive_A, "pasts", step.past_AMD)


def empty_plans(state: State) -> Tensor:
    """Return the rows whose planner chose to open nothing; none where it cannot, and without a planner."""
    step = state.planned
    if step is None or step.draw is None or not step.distribution.may_be_empty:
        return torch.zeros_like(state.step_A, dtype=torch.bool)
    return ~step.draw.chosen_BL.any(dim=1)


def asks(sampler: Any) -> str | None:
    """Return the slot of the part that asks a planner: `schedule` for lengths, `score` for positions; None for none."""
    if bare(sampler.schedule) is SLOTS["schedule"].get("planned"):
        return "schedule"
    return "score" if bare(sampler.score) is planner else None


def check_planner(sampler: Any, denoiser: Any) -> None:
    """Warn where a sampler's planner was trained with another denoiser; RecipeError where its file is none."""
    slot = asks(sampler)
    knobs = {} if slot is None else knobs_of(getattr(sampler, slot))
    if slot is not None and knobs.get("acting") is None:
        if knobs.get("path") is None:
            _opened(slot, None, torch.device("cpu"))
        known = fingerprint_of(denoiser) if hasattr(denoiser, "base") else None
        spec = load_planner(Path(knobs["path"]), fingerprint=known).spec
        check_kind(slot, spec)
        check_remasking(sampler, spec)


def check_remasking(sampler: Any, spec: PlannerSpec) -> None:
    """Raise RecipeError where a planner takes tokens back and its sampler does not, or the other way round."""
    taking = bare(sampler.remasking) is SLOTS["remasking"].get("planned")
    if sampler.plans and spec.remasks != taking:
        raise RecipeError(f"sampler.remasking: {WITHOUT if spec.remasks else WITH}")
