"""What the engine must know of a part beside its signature: the statistics it reads, and what its log-prob is worth."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

# What log p(trajectory) is made of, from the best to the worst (samplers.md section 1.7).
STATUSES = ("exact", "exact with order", "exact with tail mass", "behaviour only", "none")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Traits:
    """What the engine must know of a part.

    `needs`: optional fields of Statistics; `status`: one of STATUSES; `learns`: why it is not exact, for the user.
    `canvas`: statistics of decided tokens are wanted too, with `local` those of the schedule's region alone; `shadow`:
    they are those of a column that does not see the token (`rollouts.shadow`). `open`: statistics of every mask, also
    outside the window; `everywhere`: of every position that exists. `plans`: a selection or schedule that draws from a
    planner's distribution, which is recorded as an action of its own. `whole`: a transform that looks at all logits of
    a step before it changes any; `group`: rollouts of a group are not independent. `drops`: a remasking that discards
    what was drawn in the same step. `history`: decides with noise or memory that only the rollout has, so that a
    trainer cannot rebuild it.
    """

    needs: frozenset[str] = frozenset()
    status: str = "exact"
    learns: str = ""
    canvas: bool = False
    local: bool = False
    shadow: bool = False
    open: bool = False
    everywhere: bool = False
    plans: bool = False
    whole: bool = False
    group: bool = False
    drops: bool = False
    history: bool = False


def traits(*, needs: tuple[str, ...] = (), status: str = "exact", learns: str = "", **flags: bool) -> Callable[[F], F]:
    """Return a decorator that gives a part its traits."""
    assert status in STATUSES

    def mark(function: F) -> F:
        function.traits = Traits(frozenset(needs), status, learns, **flags)  # type: ignore[attr-defined]
        return function

    return mark


def bare(part: Any) -> Any:
    """Return the function under a part's bound knobs."""
    return part.func if isinstance(part, partial) else part


def knobs_of(part: Any) -> dict[str, Any]:
    """Return a part's bound knobs."""
    return dict(part.keywords) if isinstance(part, partial) else {}


def knob_of(part: Any, name: str) -> Any:
    """Return the value of a part's knob: the bound one, else its default; None for a part without it."""
    if name in knobs_of(part):
        return knobs_of(part)[name]
    parameter = inspect.signature(bare(part)).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def traits_of(part: Any) -> Traits:
    """Return a part's traits; those of a user's function without any are the defaults."""
    return getattr(bare(part), "traits", Traits())


def wants(part: Any, name: str) -> bool:
    """Return whether a part has a parameter `name`, which the engine then gives it."""
    return name in inspect.signature(bare(part)).parameters


def reach_of(found: tuple[Traits, ...]) -> str:
    """Return where a sampler whose parts have these traits wants statistics.

    In the `window`, at all `open` positions, also at tokens of its `region` or `canvas`, or `everywhere`.
    """
    looking = [traits for traits in found if traits.canvas]
    open_too = any(traits.open for traits in found)
    if any(traits.everywhere for traits in found) or (open_too and looking):
        return "everywhere"
    if open_too:
        return "open"
    return "window" if not looking else "region" if all(traits.local for traits in looking) else "canvas"
