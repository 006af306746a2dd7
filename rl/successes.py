"""Past successes: the latest right rollout of each problem, put into a later group of that problem which failed.

The buffer is the same on every rank and lies in every checkpoint. A rollout that comes back keeps the log-probs that
the policy of its time gave it, so that a ratio to the rollout's own log-probs corrects for its age.
"""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..recipes.tasks import Row
from ..rollouts.exploration import failed_groups, splice
from ..rollouts.trajectory import HINT, Trajectory
from ..rollouts.worker import RolloutBatch, RolloutWorker
from .distributed import gather_objects, rank
from .tensorfiles import load_trajectory, save_trajectory

FILE = "successes.safetensors"


class Successes:
    """The latest success of each of at most `capacity` problems; the one that came in first goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: OrderedDict[str, Trajectory] = OrderedDict()

    def remember(self, batch: RolloutBatch) -> None:
        """Keep the first right rollout of each group of all ranks; every rank must call this, and keeps the same.

        Rollouts with hints are none of the policy's own, and are left out.
        """
        own_B = ~(batch.trajectory.source_BL == HINT).any(dim=1)
        found: dict[str, Trajectory] = {}
        for place, outcome in enumerate(batch.rewards.outcome):
            key = problem(batch.rows[place])
            if outcome == "ok" and bool(own_B[place]) and key not in found:
                found[key] = lean(batch.trajectory.select(torch.tensor([place])))
        for part in gather_objects(found):
            for key, trajectory in part.items():
                self.kept.pop(key, None)
                self.kept[key] = trajectory
        while len(self.kept) > self.capacity:
            self.kept.popitem(last=False)

    def recall(self, batch: RolloutBatch, worker: RolloutWorker, step: int) -> RolloutBatch:
        """Return the batch with a past success in the place of one rollout of each failed group that has any.

        Which rollout gives way is drawn by a key of seed, step and group; the success is judged anew.
        """
        first = {int(group): place for place, group in reversed(list(enumerate(batch.group_B)))}
        places, past, rows = [], [], []
        for group in failed_groups(batch):
            row = batch.rows[first[group]]
            trajectory = self.kept.get(problem(row))
            if trajectory is not None:
                rng = random.Random(f"recall/{worker.seed}/{step}/{group}")
                places.append(first[group] + rng.randrange(worker.group))
                past.append(trajectory)
                rows.append(row)
        if not places:
            return batch
        index = torch.tensor(places)
        own = batch.trajectory.select(index)
        # The prompt of a problem is what it was; its padding is this batch's.
        trajectory = replace(
            Trajectory.cat(past),
            prompt_BQ=own.prompt_BQ,
            prompt_mask_BQ=own.prompt_mask_BQ,
            rollout_id_B=own.rollout_id_B,
        )
        place_B = torch.full((len(batch),), -1)
        place_B[index] = torch.arange(len(index))
        return splice(batch, judged(trajectory, rows, worker), place_B)

    def save(self, folder: Path) -> None:
        """Write the buffer into a checkpoint's folder; rank 0 does it for all."""
        if rank() == 0 and self.kept:
            trajectory = Trajectory.cat(list(self.kept.values()))
            save_trajectory(folder / FILE, trajectory, {"problems": json.dumps(list(self.kept))})

    def load(self, folder: Path | None) -> None:
        """Read the buffer of a checkpoint's folder; empty without one."""
        self.kept.clear()
        if folder is None or not (folder / FILE).is_file():
            return
        trajectory, metadata = load_trajectory(folder / FILE)
        for place, key in enumerate(json.loads(metadata["problems"])):
            self.kept[key] = lean(trajectory.select(torch.tensor([place])))


def problem(row: Row) -> str:
    """Return what tells problems apart: the prompt."""
    return json.dumps(row["prompt"])


def lean(trajectory: Trajectory) -> Trajectory:
    """Return one rollout without prompt and without the steps that only longer ones of its batch have.

    What is read from a file, padded to the longest of all, is then what was kept before, to the bit.
    """
    steps = int(trajectory.steps_B[0])
    wide: dict[str, Any] = {"choice_logprob_BS": steps, "length_BS": steps + 1}
    cut = {n: value[:, :width].clone() for n, width in wide.items() if (value := getattr(trajectory, n)) is not None}
    empty = {name: getattr(trajectory, name)[:, :0].clone() for name in ("prompt_BQ", "prompt_mask_BQ")}
    return replace(trajectory, **cut, **empty)


def judged(trajectory: Trajectory, rows: Sequence[Row], worker: RolloutWorker) -> RolloutBatch:
    """Return a batch of rollouts that were made earlier."""
    ids, texts = worker.decode(trajectory)
    rewards = worker.scorer(list(rows), [row["prompt"] for row in rows], texts, ids)
    return RolloutBatch(trajectory, list(rows), texts, ids, torch.arange(len(rows)), rewards)
