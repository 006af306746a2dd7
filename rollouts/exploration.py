"""Exploration: what is done for groups of rollouts that failed altogether, before anything is learnt from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .canvases import Frame
from .hints import hintable, hints
from .noise import derived
from .trajectory import HINT, Trajectory
from .worker import RolloutBatch, RolloutWorker, token_offsets

exploration = SLOTS["exploration"]


def failed_groups(batch: RolloutBatch) -> list[int]:
    """Return the groups without a single right rollout (outcome ok), in the order of the batch."""
    right = {int(group) for group, outcome in zip(batch.group_B, batch.rewards.outcome, strict=True) if outcome == "ok"}
    return [group for group in dict.fromkeys(batch.group_B.tolist()) if group not in right]


def splice(batch: RolloutBatch, other: RolloutBatch, place_B: Tensor) -> RolloutBatch:
    """Return `batch` with rollout b replaced by rollout `place_B[b]` of `other`; -1 keeps it.

    Group ids are the batch's, and so are its metrics.
    """
    index_B = torch.where(place_B < 0, torch.arange(len(batch)), place_B + len(batch))
    chosen = index_B.tolist()

    def pick(own: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        both = [*own, *others]
        return [both[i] for i in chosen]

    return replace(
        batch,
        trajectory=Trajectory.cat([batch.trajectory, other.trajectory]).select(index_B),
        rows=pick(batch.rows, other.rows),
        completions=pick(batch.completions, other.completions),
        completion_ids=pick(batch.completion_ids, other.completion_ids),
        rewards=batch.rewards.spliced(other.rewards, index_B),
    )


@exploration.register
def inpaint_on_failure(
    batch: RolloutBatch,
    worker: RolloutWorker,
    step: int,
    *,
    column: str = "reference",
    low: float = 0.2,
    high: float = 0.6,
    shortest: int = 5,
    longest: int = 10,
    answer: Literal["everywhere", "marked"] = "everywhere",
    most: float = 0.5,
) -> RolloutBatch:
    """A failed group is rolled out again with hints; verified ones replace at most `most` of it (IGPO).

    The hints are those of the canvas part `hints`. Which of the right rollouts are taken is drawn by a key of seed,
    step and group; each takes the place with its own number. One more rollout for each failed group.
    """
    if not 0 < most <= 1:
        raise RecipeError(f"exploration.hints.most: {most} must lie in (0, 1], it is a share of the group.")
    failed = failed_groups(batch)
    if not failed:
        return batch
    first = {int(group): place for place, group in reversed(list(enumerate(batch.group_B)))}
    rows = [batch.rows[first[group]] for group in failed]
    knobs: dict[str, Any] = {"column": column, "answer": answer}
    start = partial(hints, low=low, high=high, shortest=shortest, longest=longest, **knobs)
    # A seed of its own: with the same noise the same tokens would be drawn where the hints change nothing.
    hinted = replace(worker, start=start, seed=derived(worker.seed, "inpaint")).collect(rows, step=step, ids=failed)
    given_B = (hinted.trajectory.source_BL == HINT).any(dim=1).tolist()
    place_B = torch.full((len(batch),), -1)
    for index, group in enumerate(failed):
        own = range(index * worker.group, (index + 1) * worker.group)
        right = [place for place in own if given_B[place] and hinted.rewards.outcome[place] == "ok"]
        rng = random.Random(f"inpaint/{worker.seed}/{step}/{group}")
        for place in rng.sample(right, min(len(right), int(most * worker.group))):
            # A rollout keeps its id, and so its place in the group.
            place_B[first[group] + place - own.start] = place
    leaks = leaked(hinted.trajectory, hinted.rows, worker, **knobs)
    batch = splice(batch, hinted, place_B)
    batch.metrics["explore/tried"] = len(hinted) / len(batch)
    batch.metrics["explore/leak"] = leaks / len(batch)
    return batch


inpaint_on_failure.again = 1  # type: ignore[attr-defined]  # rollouts more, for each of a failed group


def leaked(
    trajectory: Trajectory, rows: Sequence[dict[str, Any]], worker: RolloutWorker, *, column: str, answer: str
) -> int:
    """Return on how many canvases a token of the answer was given as a hint; 0 unless something is wrong."""

    def allowed(row: dict[str, Any]) -> list[bool]:
        offsets = partial(token_offsets, worker.tokenizer)
        frame = Frame(trajectory.canvas, trajectory.mask_token_id, (), lambda text: [], torch.zeros(1), offsets)
        return hintable(row, frame, column=column, answer=answer)

    hints_BL = (trajectory.source_BL == HINT).tolist()
    pairs = zip(hints_BL, map(allowed, rows), strict=True)
    return sum(any(hint and not may for hint, may in zip(given, may_L, strict=False)) for given, may_L in pairs)
