"""Caches: which columns a step computes anew, and which it sees, where keys and values are kept between steps.

A cache policy reads the state and a `Layout` of the T = Q + L columns of prompt and canvas and returns a `Recompute`.
What the step asks for is computed whatever the policy says, padding never; a column is seen where its keys are stored
or just computed, it is visible, and the family's attention lets it. With `refresh: 1` every policy computes everything
at every step, which is no cache at all.

Keys change with every token where attention is full: there all caches are approximations, and the rollout's log-probs
are those of another distribution than the trainer recomputes (samplers.md section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..policies.blocks import PADDING
from ..recipes.registry import SLOTS, RecipeError
from .state import State
from .traits import bare, traits

cache = SLOTS["cache"]
MEMORY = "cache"


class Layout(NamedTuple):
    """What a policy knows of the columns of the live rows: prompt first (Q = `prompt` columns), then the canvas.

    `real_AT`: tokens, not padding. `asked_AT`: what the step reads. `stored_AT`: keys and values are there.
    `changed_AT`: real, and not stored or computed from another token than the present one. `block_AT`: the block of
    each column; None with full attention.
    """

    prompt: int
    real_AT: Tensor
    asked_AT: Tensor
    stored_AT: Tensor
    changed_AT: Tensor
    block_AT: Tensor | None = None

    @staticmethod
    def of(state: State) -> Layout:
        """Return the layout of canvases without prompts of which nothing is stored, for calling policies alone."""
        real_AT = torch.ones_like(state.masked_AL)
        place_AT = torch.arange(real_AT.shape[1], device=real_AT.device).expand(real_AT.shape)
        return Layout(0, real_AT, state.masked_AL, torch.zeros_like(real_AT), real_AT, place_AT)

    def on_canvas(self, table_AL: Tensor) -> Tensor:
        """Return a bool table of the canvas as one of all columns, False on the prompt."""
        return torch.nn.functional.pad(table_AL, (self.prompt, 0))


class Recompute(NamedTuple):
    """The columns that a step computes, and those that may be seen (None: all)."""

    columns_AT: Tensor
    visible_AT: Tensor | None = None


@cache.register
def block_causal(state: State, layout: Layout) -> Recompute:
    """Exact for block-causal families: all blocks from the first that has changed up to the last that is asked for.

    A block that was just finished is computed once more, now clean, in the forward that takes the next block's first
    step; from then on nothing changes its keys (BD3-LM, Arriola et al. 2025; SDAR stores them in a forward of its own).
    The first step computes the prompt with it. Tokens that are taken back reopen their block and those behind it.
    """
    block_AT = layout.block_AT
    assert block_AT is not None, "check_family lets block-causal families pass"
    first_A1 = torch.where(layout.changed_AT, block_AT, PADDING).amin(dim=1, keepdim=True)
    last_A1 = torch.where(layout.asked_AT | layout.stored_AT, block_AT, -1).amax(dim=1, keepdim=True)
    return Recompute((block_AT >= first_A1) & (block_AT <= last_A1))


@cache.register
@traits(status="behaviour only", learns="what lies before the block has keys of an earlier canvas")
def prefix(state: State, layout: Layout, *, refresh: int = 0) -> Recompute:
    """Keeps what lies before the current block; all is computed at a block's start (Fast-dLLM, arXiv 2505.22618).

    `refresh` > 0 does so every that many steps of a block, too.
    """
    _at_least("refresh", refresh, 0)
    start_A, age_A = _block(state)
    place_T = torch.arange(layout.real_AT.shape[1], device=start_A.device)
    return Recompute((place_T >= layout.prompt + start_A[:, None]) | _due(age_A, refresh))


@cache.register
@traits(status="behaviour only", learns="what lies outside the block has keys of an earlier canvas")
def dual(state: State, layout: Layout, *, refresh: int = 0) -> Recompute:
    """Keeps all but the current block; all is computed at a block's start (Fast-dLLM, section 3.2, DualCache).

    `refresh` > 0 does so every that many steps of a block, too.
    """
    _at_least("refresh", refresh, 0)
    _, age_A = _block(state)
    return Recompute(layout.on_canvas(_region(state)) | _due(age_A, refresh))


@cache.register
@traits(status="behaviour only", learns="decided tokens have keys of an earlier canvas")
def dkv_decode(state: State, layout: Layout, *, refresh: int = 8, warmup: int = 2) -> Recompute:
    """Keeps decided tokens from the second step after their decision on (dKV-Cache-Decode, arXiv 2505.15781).

    One step late, so that their keys come from the token and not from the mask. All is computed in the first `warmup`
    steps of a block and every `refresh` steps of it.
    """
    _at_least("refresh", refresh, 1)
    _at_least("warmup", warmup, 1)
    _, age_A = _block(state)
    due_A1 = _due(age_A, refresh) | (age_A < warmup)[:, None]
    return Recompute(layout.on_canvas(state.masked_AL) | layout.changed_AT | due_A1)


@cache.register
@traits(status="behaviour only", learns="all but the window and the newest tokens has keys of an earlier canvas")
def dkv_greedy(state: State, layout: Layout, *, refresh: int = 2, near: int = 0) -> Recompute:
    """Keeps all but the open window, the newest tokens and `near` masks on each side (dKV-Cache-Greedy, 2505.15781).

    All is computed every `refresh` steps of a block. The released code knows the next positions beforehand, since it
    decides in random order alone; here the schedule's window stands for them, whatever the order.
    """
    _at_least("refresh", refresh, 1)
    _at_least("near", near, 0)
    assert state.window_AL is not None
    _, age_A = _block(state)
    place_AL = state.masked_AL.cumsum(dim=1)
    room = place_AL.shape[1] + 1
    low_A1 = torch.where(state.window_AL, place_AL, room).amin(dim=1, keepdim=True) - near
    high_A1 = torch.where(state.window_AL, place_AL, -room).amax(dim=1, keepdim=True) + near
    near_AL = state.masked_AL & (place_AL >= low_A1) & (place_AL <= high_A1)
    return Recompute(layout.on_canvas(near_AL) | layout.changed_AT | _due(age_A, refresh))


@cache.register
@traits(status="behaviour only", learns="prompt and finished blocks have keys of an earlier canvas")
def free_cache(state: State, layout: Layout, *, refresh: int = 0) -> Recompute:
    """Keeps what lies before the current block as its last step left it (FreeCache, Hu et al. 2025, arXiv 2505.21467).

    The prompt is computed once, a block for the last time before its last tokens are decided. `refresh` > 0 computes
    all every that many steps.
    """
    _at_least("refresh", refresh, 0)
    start_A, _ = _block(state)
    place_T = torch.arange(layout.real_AT.shape[1], device=start_A.device)
    return Recompute((place_T >= layout.prompt + start_A[:, None]) | _due(state.step_A, refresh))


@cache.register
@traits(status="behaviour only", learns="far masks are left out, the rest has keys of an earlier canvas")
def window_diffusion(state: State, layout: Layout, *, refresh: int = 32, outer: int = 64, inner: int = 16) -> Recompute:
    """Prunes the masks behind the first `outer` and computes the first `inner` of them (Window-Diffusion).

    Cycles of `refresh` steps: the first computes what is decided and the first `outer` masks, and nothing else is seen
    until the next; the others compute the first `inner` masks and what was decided in the cycle. With `refresh: 1` and
    `outer` of the canvas it is no cache. Source: vhicrgit/Window-Diffusion, llada/ and dream/.
    """
    for name, value in (("refresh", refresh), ("outer", outer), ("inner", inner)):
        _at_least(name, value, 1)
    masked_AL, place_AL = state.masked_AL, state.masked_AL.cumsum(dim=1)
    phase_A1 = (state.step_A % refresh)[:, None]
    fresh_AL = state.exists_AL & (~masked_AL | (place_AL <= outer))
    since_AL = state.born_AL >= (state.step_A[:, None] - phase_A1)
    visible_AL = torch.where(phase_A1 == 0, fresh_AL, state.memory.get(MEMORY, fresh_AL) | since_AL)
    state.memory[MEMORY] = visible_AL
    active_AL = visible_AL & ((masked_AL & (place_AL <= inner)) | since_AL)
    visible_AT = layout.on_canvas(visible_AL)
    visible_AT[:, : layout.prompt] = True
    return Recompute(torch.where(phase_A1 == 0, visible_AT, layout.on_canvas(active_AL)), visible_AT)


def check_cache(policy: Callable[..., Any] | None, denoiser: Any) -> None:
    """Raise RecipeError where a denoiser cannot keep what the policy of a sampler wants kept."""
    if policy is None:
        return
    name = getattr(bare(policy), "__name__", "cache")
    if not hasattr(denoiser, "columns"):
        raise RecipeError(
            f"sampler.cache: '{name}' needs the keys and values of a Denoiser; {type(denoiser).__name__} gives logits "
            "alone, so set cache to null."
        )
    check_family(policy, denoiser.family)
    kernel = denoiser.base.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise RecipeError(f"sampler.cache: '{name}' hides keys by a mask, which {kernel} does not take; use sdpa.")


def check_family(policy: Callable[..., Any], family: Any) -> None:
    """Raise RecipeError for a family that the policy is not for."""
    if family.name == "modernbert":
        raise RecipeError(f"sampler.cache: family '{family.name}' is an encoder that keeps no keys; set cache to null.")
    if bare(policy) is block_causal and family.attention == "full":
        raise RecipeError(
            f"sampler.cache: 'block_causal' is exact for block-causal families alone, and '{family.name}' attends to "
            "the whole canvas; use cache dual or prefix (approximate), or null."
        )


def _region(state: State) -> Tensor:
    """Return the positions that the step works on: the schedule's block, or the canvas."""
    assert state.quota is not None
    return state.exists_AL if state.quota.region_BL is None else state.quota.region_BL


def _block(state: State) -> tuple[Tensor, Tensor]:
    """Return the first position of the block that each row works on, and the steps it has spent there."""
    start_A = _region(state).to(torch.int8).argmax(dim=1)
    begun_A2 = state.memory.get(MEMORY, torch.full((len(start_A), 2), -1, device=start_A.device))
    since_A = torch.where(begun_A2[:, 0] == start_A, begun_A2[:, 1], state.step_A)
    state.memory[MEMORY] = torch.stack([start_A, since_A], dim=1)
    return start_A, state.step_A - since_A


def _due(age_A: Tensor, every: int) -> Tensor:
    """Return `[A, 1]`, whether all columns are due: at age 0 and, if `every` is not 0, at its multiples."""
    due_A = age_A == 0
    return (due_A | (age_A % every == 0) if every else due_A)[:, None]


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise RecipeError(f"cache.{name}: {value} must be at least {least}.")
