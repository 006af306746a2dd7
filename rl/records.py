"""What a run leaves to read: metrics and timings as JSON lines, rollouts as parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from torch import Tensor

from ..rewards import OUTCOMES
from ..rollouts.trajectory import Trajectory
from ..rollouts.worker import RolloutBatch
from .runfolder import FILES, read_lines

CLOCK = "time/"
# A token that was taken back: its place, id, steps of birth and death, order in its step, log-probability.
LIFE = {
    **dict.fromkeys(("position", "token", "born", "died", "rank"), pyarrow.int64()),
    "logprob": pyarrow.float32(),
}


class Records:
    """Appends to `metrics.jsonl` (a pure function of recipe and seed) and `timing.jsonl` (what clocks say)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def lengths(self) -> dict[str, int]:
        """Return the length in bytes of each file, for `rewind`."""
        return {name: (self.folder / name).stat().st_size for name in FILES if (self.folder / name).is_file()}

    def rewind(self, lengths: dict[str, int]) -> None:
        """Cut what was written after `lengths` were taken, which a resumed run will write again."""
        for name in FILES:
            path = self.folder / name
            if path.is_file() and path.stat().st_size > lengths.get(name, 0):
                os.truncate(path, lengths.get(name, 0))

    def read(self) -> list[dict[str, Any]]:
        """Return the records of `metrics.jsonl`."""
        return read_lines(self.folder / FILES[0])

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one step's values, clock readings to the other file."""
        clocks = {key: value for key, value in values.items() if key.startswith(CLOCK)}
        others = {key: value for key, value in values.items() if not key.startswith(CLOCK)}
        for name, record in zip(FILES, (others, clocks), strict=True):
            if record:
                with (self.folder / name).open("a") as file:
                    file.write(json.dumps({"step": step, **record}) + "\n")


def rollout_table(batch: RolloutBatch, step: int) -> dict[str, Any]:
    """Return a batch as columns: text, tokens with their step map and log-probs, rewards, advantage and outcome."""
    trajectory, rewards, prompts = batch.trajectory, batch.rewards, [row["prompt"] for row in batch.rows]
    advantage = [None] * len(batch) if batch.advantage_B is None else batch.advantage_B.tolist()
    advantage = [None if value != value else value for value in advantage]
    table: dict[str, Any] = {
        "step": [step] * len(batch),
        "rollout_id": trajectory.rollout_id_B.tolist(),
        "group": batch.group_B.tolist(),
        "prompt": [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts],
        "completion": batch.completions,
        "tokens": trajectory.tokens_BL.tolist(),
        "source": trajectory.source_BL.tolist(),
        "born": trajectory.born_BL.tolist(),
        "logprob": trajectory.logprob_BL.tolist(),
        "nfe": trajectory.steps_B.tolist(),
        "reward": [None if value != value else value for value in rewards.total_B.tolist()],
        "advantage": advantage,
        "outcome": list(rewards.outcome),
    }
    for name, value_BS in (("step_reward", batch.step_reward_BS), ("step_advantage", batch.step_advantage_BS)):
        if value_BS is not None:
            rows = zip(value_BS.tolist(), trajectory.steps_B.tolist(), strict=True)
            table[name] = [[None if v != v else v for v in row[:count]] for row, count in rows]
    table |= _changes(trajectory)
    for index, name in enumerate(rewards.names):
        table[f"reward/{name}"] = [None if v != v else v for v in rewards.value_BR[:, index].tolist()]
    for name, values in rewards.extra.items():
        if name != "outcome":
            table[f"extra/{name}"] = [None if value is None else str(value) for value in values]
    return table


def _changes(trajectory: Trajectory) -> dict[str, Any]:
    """Return what a sampler took back of each rollout, and the lengths of canvases that change theirs."""
    table: dict[str, Any] = {}
    if trajectory.retracted is not None:
        lives: list[list[dict[str, Any]]] = [[] for _ in range(len(trajectory))]
        for row, *entry in zip(*(value.tolist() for value in trajectory.retracted), strict=True):
            lives[row].append(dict(zip(LIFE, entry, strict=True)))
        # The type is given, so that a batch without any has the columns of one with some.
        table["retracted"] = pyarrow.array(lives, type=pyarrow.list_(pyarrow.struct(LIFE)))
    if trajectory.length_BS is not None and trajectory.appeared_BL is not None:
        steps = trajectory.steps_B.tolist()
        lengths = zip(trajectory.length_BS.tolist(), steps, strict=True)
        table["lengths"] = [row[: count + 1] for row, count in lengths]
        table["appeared"] = trajectory.appeared_BL.tolist()
    return table


def write_rollouts(folder: Path, batch: RolloutBatch, step: int, rank: int) -> Path:
    """Write a batch as `rollouts/step-N[-rank].parquet`, whole or not at all."""
    folder = folder / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"step-{step:06}.parquet" if rank == 0 else f"step-{step:06}-rank{rank}.parquet")
    temporary = path.with_suffix(".tmp")
    pyarrow.parquet.write_table(pyarrow.table(rollout_table(batch, step)), temporary)
    os.replace(temporary, path)
    return path


def batch_metrics(batch: RolloutBatch) -> dict[str, tuple[float, int]]:
    """Return (mean, how many rollouts it is over) of what the worker measured, rewards, outcomes and advantages."""
    rewards, count = batch.rewards, len(batch)
    values = {name: (value, count) for name, value in batch.metrics.items()}
    if "rollout/logprob" in batch.metrics:  # a mean over tokens
        values["rollout/logprob"] = (batch.metrics["rollout/logprob"], int(batch.trajectory.action_BL("all").sum()))
    values["rollout/empty"] = (sum(not text.strip() for text in batch.completions) / max(count, 1), count)
    values["reward/total"] = _mean(rewards.total_B)
    for name, value_B in rewards.components().items():
        values[name] = _mean(value_B)
    for outcome in OUTCOMES:
        values[f"outcome/{outcome}"] = (sum(o == outcome for o in rewards.outcome) / max(count, 1), count)
        for name, codes in rewards.codes.items():
            values[f"outcome/{name}/{outcome}"] = (codes.count(outcome) / max(count, 1), count)
    if batch.advantage_B is not None:
        # NaN marks a rollout that no reward applies to: it gives no signal either.
        values["advantage/zero_share"] = ((batch.advantage_B.nan_to_num(0.0) == 0).double().mean().item(), count)
    return values | {f"custom/{name}": (value, count) for name, value in rewards.metrics.items()}


def merge_metrics(ranks: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Return the means over the rollouts of all ranks; what applied to no rollout is left out."""
    merged = {}
    for name in sorted({name for rank in ranks for name in rank}):
        parts = [rank[name] for rank in ranks if name in rank and rank[name][1]]
        if parts:
            merged[name] = sum(mean * count for mean, count in parts) / sum(count for _, count in parts)
    return merged


def _mean(value_B: Tensor) -> tuple[float, int]:
    kept = value_B[~value_B.isnan()].double()
    return (kept.mean().item() if len(kept) else 0.0), len(kept)
