"""Selections that look beyond one score a position: at its neighbours, at earlier steps, at what was committed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .measures import Statistics
from .ranking import Bar, best, check_level, check_positive, fewest, rank
from .schedules import Quota
from .state import State
from .traits import traits

selection = SLOTS["selection"]


@selection.register
def local_leap(score_BL: Tensor, quota: Quota, *, level: float = 0.9, relaxed: float = 0.75, radius: int = 4) -> Tensor:
    """Positions that reach log(level), the anchors, and those that reach log(relaxed) within `radius` of an anchor.

    The best position alone where there is no anchor, whatever the quota (LocalLeap, Kong et al. 2025).
    """
    anchor_BL = (score_BL >= check_level(level)) & quota.window_BL
    if not 0 < relaxed <= level:
        raise RecipeError(f"selection.relaxed: {relaxed} must lie in (0, level], here {level}.")
    _check_count(radius, "radius")
    near_BL = _around(anchor_BL, radius) & (score_BL >= check_level(relaxed, "relaxed")) & quota.window_BL
    return near_BL | anchor_BL | best(score_BL, quota.window_BL)


def _around(anchor_BL: Tensor, radius: int) -> Tensor:
    """Return the positions at most `radius` from an anchor, itself included."""
    wide_B1L = torch.nn.functional.max_pool1d(anchor_BL[:, None].float(), 2 * radius + 1, stride=1, padding=radius)
    return wide_B1L[:, 0] > 0


def _leap_bar(
    score_BL: Tensor,
    chosen_BL: Tensor,
    window_BL: Tensor,
    *,
    level: float = 0.9,
    relaxed: float = 0.75,
    radius: int = 4,
) -> Bar:
    # Every anchor is chosen, so the chosen ones say how far each other position is from one.
    anchor_BL = chosen_BL & (score_BL >= check_level(level))
    none_B1 = ~anchor_BL.any(dim=1, keepdim=True)
    bar_BL = torch.where(_around(anchor_BL, radius), check_level(relaxed), check_level(level)).to(score_BL.dtype)
    alone_B1 = torch.where(chosen_BL, score_BL, -torch.inf).amax(dim=1, keepdim=True)
    # Equality reaches a level; without an anchor the tie goes to the smaller index.
    after_BL = best(score_BL, chosen_BL).cumsum(dim=1) > 0
    return Bar(torch.where(none_B1, alone_B1, bar_BL), none_B1 & after_BL)


local_leap.bar = _leap_bar  # type: ignore[attr-defined]


@selection.register
def hierarchical(score_BL: Tensor, quota: Quota, *, level: float = 0.92, low: float = 0.62) -> Tensor:
    """Of each run of open positions the best if it reaches log(low), and besides all that reach log(level).

    The best of the row in any case, whatever the quota. Confident runs break in halves, so that a block of B takes
    about log2 B steps (dInfer, arXiv 2510.08666, hierarchical decoding).
    """
    if not 0 < low <= level:
        raise RecipeError(f"selection.low: {low} must lie in (0, level], here {level}.")
    run_best_BL, first_BL = _run_best(score_BL, quota.window_BL, quota.window_BL)
    leads_BL = (first_BL == _places(score_BL)) & (run_best_BL >= check_level(low, "low"))
    sure_BL = score_BL >= check_level(level)
    return ((leads_BL | sure_BL) & quota.window_BL) | best(score_BL, quota.window_BL)


def _places(score_BL: Tensor) -> Tensor:
    return torch.arange(score_BL.shape[1], device=score_BL.device).expand_as(score_BL)


def _run_best(score_BL: Tensor, inside_BL: Tensor, window_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every position the best score among `inside_BL` of its run and the place that has it first.

    A run is a maximal sequence of neighbouring window positions; -inf and L where none of it is inside.
    """
    length, place_BL = score_BL.shape[1], _places(score_BL)
    run_BL = (window_BL & ~torch.nn.functional.pad(window_BL, (1, 0))[:, :-1]).cumsum(dim=1)
    known_BL = torch.where(inside_BL, score_BL, -torch.inf)
    best_BR = known_BL.new_full((len(score_BL), length + 1), -torch.inf)
    run_best_BL = best_BR.scatter_reduce(1, run_BL, known_BL, "amax").gather(1, run_BL)
    setter_BL = torch.where(inside_BL & (known_BL == run_best_BL), place_BL, length)
    first_BR = run_BL.new_full((len(score_BL), length + 1), length)
    return run_best_BL, first_BR.scatter_reduce(1, run_BL, setter_BL, "amin").gather(1, run_BL)


def _hierarchical_bar(
    score_BL: Tensor, chosen_BL: Tensor, window_BL: Tensor, *, level: float = 0.92, low: float = 0.62
) -> Bar:
    # What was left open is below its run's best, or below `low` where that is; and below the row's best.
    place_BL, high, least = _places(score_BL), check_level(level), check_level(low, "low")
    run_best_BL, first_BL = _run_best(score_BL, chosen_BL, window_BL)
    lead_B1 = torch.where(chosen_BL, score_BL, -torch.inf).amax(dim=1, keepdim=True)
    lead_place_B1 = torch.where(best(score_BL, chosen_BL), place_BL, 0).sum(dim=1, keepdim=True)
    bar_BL = run_best_BL.clamp(min=least, max=high).minimum(lead_B1)
    # A tie goes to the smaller index where another position set the bar, and passes where a level did.
    in_run_BL = (run_best_BL >= least) & (run_best_BL < high) & (place_BL > first_BL)
    return Bar(bar_BL, torch.where(lead_B1 < least, place_BL > lead_place_B1, in_run_BL))


hierarchical.bar = _hierarchical_bar  # type: ignore[attr-defined]


@selection.register
def running_threshold(score_BL: Tensor, quota: Quota, *, state: State) -> Tensor:
    """Every position more probable than those committed so far are on average, and never fewer than the quota (Saber).

    The average is over the probabilities with which the tokens on the canvas were committed; with none of them only the
    quota passes. The released code also counts tokens that were taken back meanwhile.
    """
    known_BL = ~state.committed_AL.isnan()
    total_B = torch.where(known_BL, state.committed_AL.exp(), 0.0).sum(dim=1)
    count_B = known_BL.sum(dim=1)
    mean_B = torch.where(count_B > 0, total_B / count_B.clamp(min=1), 1.0)
    ready_BL = (score_BL > mean_B.log()[:, None]) & quota.window_BL
    return ready_BL | fewest(score_BL, quota)


@selection.register
def explore(score_BL: Tensor, quota: Quota, *, level: float = 0.9, probes: int = 1, near: int = 32) -> Tensor:
    """Every position that reaches log(level); where none does, the `probes` least sure ones of the next `near` places.

    A round without confident tokens buys information instead of one more token that is nearly known: it decides the
    positions of lowest score among the `near` places from the row's first open one. Explore-Then-Exploit (Fu et al.
    2025, arXiv 2511.21103) says what is explored and not when; this is our choice.
    """
    _check_count(probes, "probes")
    _check_count(near, "near")
    ready_BL = (score_BL >= check_level(level)) & quota.window_BL
    place_BL = _places(score_BL)
    first_B1 = torch.where(quota.window_BL, place_BL, score_BL.shape[1]).amin(dim=1, keepdim=True)
    pool_BL = quota.window_BL & (place_BL < first_B1 + near)
    floor = torch.finfo(score_BL.dtype).min
    probe_BL = pool_BL & (rank(torch.where(pool_BL, -score_BL.clamp(min=floor), -torch.inf)) < probes)
    return torch.where(ready_BL.any(dim=1, keepdim=True), ready_BL, probe_BL)


@selection.register
@traits(needs=("top",))
def stable(
    score_BL: Tensor, quota: Quota, *, state: State, level: float = 0.6, drift: float = 0.015, steps: int = 2
) -> Tensor:
    """Positions that reach log(level) and whose distribution hardly moved; without any, the quota's number (KLASS).

    KL(p_t | p_{t-1}) must be below `drift` nats at each of the last `steps` steps that saw the position. It is bounded
    from below with the likeliest tokens of both steps and one bucket for the rest, exact where the vocabulary has no
    more tokens than are kept.
    """
    _check_count(steps, "steps")
    assert state.statistics is not None and state.statistics.top is not None
    past, seen_BL = _recall(state, quota.window_BL)
    calm_BL = (drift_bound(state.statistics, *past) < drift) & seen_BL
    count_BL = torch.where(calm_BL, state.memory.get("stable_count", torch.zeros_like(quota.window_BL).long()) + 1, 0)
    state.memory["stable_count"] = torch.where(quota.window_BL, count_BL, 0)
    ready_BL = (score_BL >= check_level(level)) & (count_BL >= steps) & quota.window_BL
    return torch.where(ready_BL.any(dim=1, keepdim=True), ready_BL, fewest(score_BL, quota))


def _recall(state: State, window_BL: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the likeliest tokens of the last step (by id) with their log p, and where they are known; keep today's."""
    statistics, memory = state.statistics, state.memory
    assert statistics is not None and statistics.top is not None and statistics.top_token is not None
    token_BLN, order_BLN = statistics.top_token.sort(dim=2)
    logp_BLN = statistics.top.gather(2, order_BLN)
    past = memory.get("stable_token", token_BLN), memory.get("stable_logp", logp_BLN)
    seen_BL = memory.get("stable_seen", torch.zeros_like(window_BL))
    memory["stable_token"], memory["stable_logp"], memory["stable_seen"] = token_BLN, logp_BLN, window_BL
    return past, seen_BL & window_BL


def drift_bound(statistics: Statistics, token_BLN: Tensor, logp_BLN: Tensor) -> Tensor:
    """Return a lower bound of KL(p | past) in nats from the N likeliest tokens of both; `token_BLN` is sorted by id.

    A token that the past does not list had at most the smallest listed probability, and all unlisted ones together are
    one bucket: both lower the divergence (log-sum inequality).
    """
    assert statistics.top is not None and statistics.top_token is not None
    place_BLN = torch.searchsorted(token_BLN, statistics.top_token).clamp(max=token_BLN.shape[2] - 1)
    same_BLN = token_BLN.gather(2, place_BLN) == statistics.top_token
    past_BLN = torch.where(same_BLN, logp_BLN.gather(2, place_BLN), logp_BLN.amin(dim=2, keepdim=True)).double()
    now_BLN = statistics.top.double()
    listed_BL = torch.where(same_BLN, past_BLN.exp(), 0.0).sum(dim=2)
    rest_BL = (1 - now_BLN.exp().sum(dim=2)).clamp(min=0.0)
    inside_BL = (now_BLN.exp() * (now_BLN - past_BLN)).nan_to_num(0.0).sum(dim=2)
    tiny = torch.finfo(rest_BL.dtype).tiny
    outside_BL = torch.special.xlogy(rest_BL, rest_BL / (1 - listed_BL).clamp(min=tiny))
    return inside_BL + outside_BL


@selection.register
def slow_fast(
    score_BL: Tensor,
    quota: Quota,
    *,
    state: State,
    level: float = 0.9,
    reach: float = 0.3,
    explore: int = 6,
    spread: float = 1.0,
) -> Tensor:
    """Cycles of slow steps that find how far the row is ripe, and fast ones inside it (SlowFast, Wei et al. 2025).

    Every step decides the positions that reach log(level), at least the best: of the whole window while slow, of
    [start, end) while fast. A slow step's end is behind the farthest open position that reaches log(reach); it holds
    once two in a row have a standard deviation below `spread`, or after `explore` steps as their mean. The cycle ends
    with its last mask.
    """
    _check_count(explore, "explore")
    check_positive(spread, "spread")
    window_BL, place_BL = quota.window_BL, _places(score_BL)
    end_B, slow_B, last_B = _cycle(state, window_BL, place_BL)
    fast_BL = window_BL & (place_BL < end_B[:, None])
    fast_B = fast_BL.any(dim=1)
    # A filled cycle, and a new block, begin with a slow step.
    slow_B = torch.where(fast_B | (end_B > 0), 0, slow_B)
    first_B = torch.where(window_BL, place_BL, score_BL.shape[1]).amin(dim=1)
    ripe_BL = window_BL & (score_BL >= check_level(reach, "reach"))
    found_B = torch.where(ripe_BL, place_BL, first_B[:, None]).amax(dim=1) + 1
    slow_B = slow_B + 1
    settled_B = (slow_B >= 2) & ((found_B - last_B).abs() < 2 * spread)
    mean_B = torch.where(slow_B >= 2, (found_B + last_B) // 2, found_B)
    next_B = torch.where(settled_B, found_B, torch.where(slow_B >= explore, mean_B, 0))
    top_B = torch.where(window_BL, place_BL, -1).amax(dim=1)
    state.memory["slow_fast"] = torch.stack(
        [torch.where(fast_B, end_B, next_B), torch.where(fast_B, 0, slow_B), found_B, top_B], dim=1
    )
    region_BL = torch.where(fast_B[:, None], fast_BL, window_BL)
    return (region_BL & (score_BL >= check_level(level))) | best(score_BL, region_BL)


def _cycle(state: State, window_BL: Tensor, place_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (end of the fast region or 0, slow steps so far, the last one's end) of each row."""
    kept_B4 = state.memory.get("slow_fast", place_BL.new_zeros(len(place_BL), 4))
    end_B, slow_B, last_B, top_B = kept_B4.unbind(dim=1)
    # A window that lies behind all of the last one is another block.
    anew_B = torch.where(window_BL, place_BL, place_BL.shape[1]).amin(dim=1) > top_B
    return torch.where(anew_B, 0, end_B), torch.where(anew_B, 0, slow_B), last_B


def _check_count(value: int, name: str) -> None:
    if value < 1:
        raise RecipeError(f"selection.{name}: {value} must be at least 1.")


@selection.register
def drafts(
    score_BL: Tensor, quota: Quota, *, level: float = 0.6, share: float = 0.7, low: int = 5, high: int = 20
) -> Tensor:
    """Positions whose score reaches log(level), the best min(max(share n, low), high) of n open ones at most.

    Never fewer than the quota. WINO drafts boldly and leaves it to remasking `verify` (Hong et al. 2025).
    """
    _check_count(low, "low")
    if not 0 < share <= 1 or high < low:
        raise RecipeError(f"selection: drafts needs share in (0, 1] and low <= high, not {share}, {low} and {high}.")
    most_B = (quota.window_BL.sum(dim=1) * share).long().clamp(min=low, max=high)
    ready_BL = (score_BL >= check_level(level)) & (rank(score_BL) < most_B[:, None]) & quota.window_BL
    return ready_BL | fewest(score_BL, quota)
