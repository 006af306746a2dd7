"""The sampler: the parts that decide how a canvas is filled, built from a recipe's section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from . import (  # noqa: F401 (importing registers the parts)
    caches,
    lengths,
    paces,
    planned,
    planned_blocks,
    remasking,
    rules,
    schedules,
    scores,
    selection,
    transforms,
)
from .forward import Rows
from .lengths import Resize
from .measures import Request
from .schedules import Quota
from .state import State
from .traits import STATUSES, Traits, bare, knob_of, knobs_of, reach_of, traits_of, wants

EOS_RULES = ("stop", "none")
LINGERING = "lingering"  # where an editing keeps the region of the last step
STEPS_PER_POSITION = 4  # the cap on steps, in canvas lengths, where a recipe sets none


@dataclass(frozen=True)
class Sampler:
    """The choices that decide how a canvas is filled; build one from a recipe with `build_sampler`.

    `temperature` is that of the draw (0 = argmax), `score_temperature` that of the distribution the score sees, `top_p`
    and `top_k` filter the draw. `eos_rule`: `stop` ends a row once an EOS is committed with everything left of it
    decided, `none` fills the canvas. `suppress_eos` forbids EOS altogether. `guidance` is that of `Forward`. At step
    `max_steps` all that is left is committed (default: four steps a position). `exact` records the log-probability of
    the positions where drawn tokens or a random order decide them. `keeps_features` records what a planner saw, from
    which it is trained.
    """

    schedule: Callable[..., Quota]
    score: Callable[..., Tensor]
    selection: Callable[..., Tensor]
    remasking: Callable[..., Tensor] | None = None
    editing: Callable[..., Tensor] | None = None
    length: Callable[..., Resize] | None = None
    transforms: tuple[Callable[..., Tensor], ...] = ()
    cache: Callable[..., Any] | None = None
    temperature: float = 1.0
    score_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 0.0
    eos_rule: str = "stop"
    suppress_eos: bool = False
    exact: bool = True
    max_steps: int | None = None
    keeps_features: bool = False

    @property
    def parts(self) -> tuple[Callable[..., Any], ...]:
        """The parts that are set."""
        chosen = (self.schedule, self.score, self.selection, self.remasking, self.editing, self.length, self.cache)
        return tuple(part for part in (*chosen, *self.transforms) if part is not None)

    @property
    def draws_first(self) -> bool:
        """Whether the positions depend on the drawn tokens."""
        return "drawn" in traits_of(self.score).needs

    @property
    def exact_choice(self) -> bool:
        """Whether the choice of positions is an action whose log-probability is recorded."""
        return self.exact and self.chooses_at_random

    @property
    def chooses_at_random(self) -> bool:
        """Whether the positions are decided by draws whose chances the weights move."""
        return self.draws_first or hasattr(bare(self.selection), "order_logprob")

    @property
    def plans(self) -> bool:
        """Whether a planner draws positions or lengths of blocks; their log-probability is recorded, and its alone."""
        return traits_of(self.selection).plans or traits_of(self.schedule).plans

    @property
    def revises(self) -> bool:
        """Whether a decided token may be taken back or replaced."""
        return self.remasking is not None or self.editing is not None

    @property
    def traits(self) -> tuple[Traits, ...]:
        """The traits of the parts that are set."""
        return tuple(traits_of(part) for part in self.parts)

    @property
    def reach(self) -> str:
        """Where statistics are wanted; see `traits.reach_of`."""
        return reach_of(self.traits)

    @property
    def shadow(self) -> bool:
        """Whether the statistics of decided tokens come from columns that do not see them."""
        return any(traits.shadow for traits in self.traits)

    @property
    def keeps_groups(self) -> bool:
        """Whether the rollouts of a group depend on each other, so that they must share a batch."""
        return any(traits.group for traits in self.traits)

    @property
    def mismatch(self) -> str | None:
        """Return why a trainer that recomputes log-probs gets others than the rollout's; None where it does not."""
        for part in (*self.transforms, self.cache):
            if part is not None and traits_of(part).status == "behaviour only":
                return f"{bare(part).__name__}: {traits_of(part).learns or 'it changes the distribution of the draw'}"
        if self.guidance:
            return "guidance: the draw mixes two predictions, the trainer recomputes one"
        if self.top_p < 1 or self.top_k:
            return "top_p, top_k: the draw is from a filtered distribution, the trainer's is whole"
        return None

    @property
    def refusal(self) -> str | None:
        """Return why rollouts have no log-probability, so that nothing can be trained on them; None where one is."""
        if self.temperature == 0:
            return "temperature 0 decides without a probability"
        for part in self.parts:
            if traits_of(part).status == "none":
                return f"{bare(part).__name__}: {traits_of(part).learns or 'it has no density'}"
        return None

    @property
    def status(self) -> str:
        """What the recorded log-probability is: one of `STATUSES` (samplers.md section 1.7)."""
        found = [traits.status for traits in self.traits] + ["none"] * bool(self.refusal)
        # What is drawn and dropped decides what stays: no closed form.
        unscored = self.chooses_at_random and (not self.exact or any(traits.drops for traits in self.traits))
        return max(found + ["behaviour only"] * bool(self.mismatch or unscored), key=STATUSES.index)

    def quota(self, state: State) -> Quota:
        """Return the schedule's quota, kept to masked positions and, where a row has any, never empty."""
        more = {"state": state} if wants(self.schedule, "state") else {}
        quota = self.schedule(state.masked_AL, state.step_A, state.open_A, **more)
        window_AL = quota.window_BL & state.masked_AL
        # Whatever a schedule of the user's says, a live row commits something: the loop ends.
        window_AL = torch.where(window_AL.any(dim=1, keepdim=True), window_AL, state.masked_AL)
        region_AL, lingers_A1 = quota.region_BL, self.lingers(state.memory, state.masked_AL)[:, None]
        if LINGERING in state.memory:
            here_AL = torch.ones_like(window_AL) if region_AL is None else region_AL
            region_AL = torch.where(lingers_A1, state.memory[LINGERING], here_AL)
        return Quota(window_AL & ~lingers_A1, quota.count_B.clamp(min=1), region_AL)

    def lingers(self, memory: dict[str, Tensor], masked_AL: Tensor) -> Tensor:
        """Return the rows whose next step only edits the region of the last one (`memory["lingering"]`)."""
        rule = getattr(bare(self.editing), "lingers", None)
        if rule is None or LINGERING not in memory:
            return torch.zeros_like(masked_AL[:, 0])
        return rule(memory, masked_AL, **knobs_of(self.editing))

    def waits(self, state: State) -> Tensor:
        """Return the rows that commit nothing: a planner said so, or the length part wants a longer canvas first."""
        rule = getattr(bare(self.length), "waits", None)
        if rule is None:
            return planned.empty_plans(state)
        return rule(state, **knobs_of(self.length)) & ~state.exists_AL.all(dim=1)

    def scores(self, state: State) -> Tensor:
        """Return `score_AL`, -inf outside the window."""
        assert state.statistics is not None and state.window_AL is not None
        position_AL = torch.arange(state.canvas_AL.shape[1], device=state.canvas_AL.device).expand_as(state.canvas_AL)
        more = {"state": state} if wants(self.score, "state") else {}
        score_AL = self.score(state.statistics, position_AL, state.uniform("score"), **more)
        return score_AL.masked_fill(~state.window_AL, -torch.inf)

    def choose(self, state: State, score_AL: Tensor, quota: Quota) -> Tensor:
        """Return the selection's positions."""
        more = {"state": state} if wants(self.selection, "state") else {}
        return self.selection(score_AL, quota, **more)

    def keys(self, state: State, score_AL: Tensor) -> Tensor:
        """Return what the chosen positions are ranked by: the score, or its noisy form where the order is drawn."""
        keys = getattr(bare(self.selection), "keys", None)
        return score_AL if keys is None else keys(score_AL, state, **knobs_of(self.selection))

    def revise(self, state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
        """Return the positions that the remasking takes back."""
        assert self.remasking is not None
        return self.remasking(state, chosen_AL, score_AL)

    def edit(self, state: State) -> Tensor:
        """Return the decided positions that take their likeliest token instead."""
        assert self.editing is not None
        return self.editing(state)

    def resized(self, state: State) -> Resize:
        """Return the change of length after a step."""
        assert self.length is not None
        return self.length(state)

    def start_length(self, canvas_BL: Tensor) -> Tensor:
        """Return the number of positions each canvas starts with."""
        initial = None if self.length is None else knob_of(self.length, "start")
        return torch.full_like(canvas_BL[:, 0], min(initial or canvas_BL.shape[1], canvas_BL.shape[1]))

    def steps_allowed(self, canvas: int) -> int:
        """Return the cap on the steps of a canvas."""
        return self.max_steps or STEPS_PER_POSITION * canvas

    def width(self, canvas: int) -> int:
        """Return the most positions that a step asks for."""
        return canvas if self.reach != "window" else self.region_width(canvas)

    def region_width(self, canvas: int) -> int:
        """Return the most positions that a region of the schedule has."""
        knobs = knobs_of(self.schedule)
        return min(knobs.get("size", canvas) * (1 + knobs.get("ahead", 0)), canvas)

    def request(self, banned: tuple[int, ...], eos: tuple[int, ...]) -> Request:
        """Return what the statistics pass is asked for."""
        needs = frozenset().union(*(traits_of(part).needs for part in self.parts))
        return Request(self.temperature, self.score_temperature, banned, eos, needs, self.top_p, self.top_k)

    def transformed(self, rows: Rows, state: State, flat_K: Tensor) -> Rows:
        """Return rows whose logits pass through the transforms, chunk by chunk or all at once as they need."""
        for part in self.transforms:
            rows = transforms.apply(part, rows, state, flat_K)
        return rows

    def banned(self, family: Any) -> tuple[int, ...]:
        """Return the token ids that are never drawn: the mask, EOS where it is suppressed, those that parts ban."""
        found = [family.mask_token_id, *(family.eos_token_ids if self.suppress_eos else ())]
        for part in self.transforms:
            bans = getattr(bare(part), "bans", None)
            found += bans(**knobs_of(part)) if bans is not None else ()
        return tuple(dict.fromkeys(found))


def build_sampler(section: Mapping[str, Any], *, temperature: float = 1.0) -> Sampler:
    """Return the Sampler of a recipe's `sampler` section; RecipeError for parts, knobs or values that do not fit."""
    if temperature < 0:
        raise RecipeError(f"rollout.temperature: {temperature} must be at least 0 (0 is argmax).")
    values = {
        key: section[key]
        for key in ("score_temperature", "top_p", "top_k", "guidance", "max_steps", "exact")
        if section.get(key) is not None
    }
    _check_values(values)
    eos = dict(section.get("eos") or {})
    rule = eos.get("rule", "stop")
    if rule not in EOS_RULES:
        raise RecipeError(f"sampler.eos.rule: '{rule}' is not one of {', '.join(EOS_RULES)}.")

    def part(slot: str, default: Any = None) -> Any:
        choice = section.get(slot, default)
        return None if choice is None else SLOTS[slot].build(choice, f"sampler.{slot}")

    chain = [
        SLOTS["transform"].build(entry, f"sampler.transforms.{i}")
        for i, entry in enumerate(section.get("transforms") or ())
    ]
    sampler = Sampler(
        schedule=part("schedule", section["schedule"]),
        score=part("score", "confidence"),
        selection=part("selection", "top"),
        remasking=part("remasking"),
        editing=part("editing"),
        length=part("length"),
        cache=part("cache"),
        transforms=tuple(chain),
        temperature=temperature,
        eos_rule=rule,
        suppress_eos=eos.get("suppress", False),
        **values,
    )
    _check_parts(sampler)
    return sampler


def _check_values(values: Mapping[str, Any]) -> None:
    for name, rule, holds in (
        ("score_temperature", "above 0, it divides logits", lambda v: v > 0),
        ("top_p", "in (0, 1], it is a probability", lambda v: 0 < v <= 1),
        ("top_k", "0 (all tokens) or more", lambda v: v >= 0),
        ("guidance", "0 (none) or more", lambda v: v >= 0),
        ("max_steps", "at least 1", lambda v: v >= 1),
    ):
        if name in values and not holds(values[name]):
            raise RecipeError(f"sampler.{name}: {values[name]} must be {rule}.")


def _check_parts(sampler: Sampler) -> None:
    """Raise RecipeError for parts that cannot hold together."""
    if sampler.length is not None and sampler.revises:
        raise RecipeError("sampler.length: a canvas that changes its length takes no tokens back; drop one of the two.")
    if sampler.length is not None and sampler.cache is not None:
        raise RecipeError("sampler.cache: no cache follows a canvas that changes its length; drop one of the two.")
    if sampler.length is not None and any(traits.open or traits.plans for traits in sampler.traits):
        raise RecipeError("sampler.length: a planner follows no canvas that changes its length; drop one of the two.")
    draws = traits_of(sampler.selection).plans
    if traits_of(sampler.schedule).plans and (draws or bare(sampler.score) is planned.planner):
        raise RecipeError(
            "sampler.schedule: 'planned' asks a planner for lengths, and a sampler has one planner; use score "
            "confidence with selection threshold, for one."
        )
    if draws and bare(sampler.score) is not planned.planner:
        raise RecipeError("sampler.selection: 'planned' draws what a planner decides; use score planner with it.")
    if bare(sampler.remasking) is remasking.planned and (not draws or sampler.editing is not None):
        raise RecipeError(
            "sampler.remasking: 'planned' is half of what selection planned draws; use both, and no editing."
        )
    if sampler.shadow and sampler.cache is not None:
        raise RecipeError("sampler.cache: no cache has the shadow columns of remasking 'verify'; drop one of the two.")
    if sampler.draws_first and not hasattr(bare(sampler.selection), "bar") and sampler.exact:
        name = getattr(bare(sampler.selection), "__name__", "selection")
        raise RecipeError(
            f"sampler.selection: '{name}' has no closed form over drawn tokens; set exact: false, or score confidence."
        )
    for slot in ("schedule", "score"):
        part = getattr(sampler, slot)
        if sampler.exact_choice and traits_of(part).history:
            raise RecipeError(
                f"sampler.{slot}: the log-probability of drawn positions needs what '{bare(part).__name__}' decided, "
                "which a trainer cannot rebuild; set exact: false, or use a selection and a score that do not draw."
            )


def traits_named(slot: str, name: str) -> Traits:
    """Return the traits of a registered part."""
    return traits_of(SLOTS[slot].get(name))
