"""What a run leaves to read: metrics and timings as JSON lines, rollouts as parquet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..rollouts.worker import RolloutBatch

CLOCK = "time/"


class Records:
    """Appends to `metrics.jsonl` (a pure function of recipe and seed) and `timing.jsonl` (what clocks say)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drop lines after `step`, which a resumed run will write again."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self.folder / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut off by a kill
            path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one step's values, clock readings to the other file."""
        clocks = {key: value for key, value in values.items() if key.startswith(CLOCK)}
        others = {key: value for key, value in values.items() if not key.startswith(CLOCK)}
        for name, record in (("metrics.jsonl", others), ("timing.jsonl", clocks)):
            if record:
                with (self.folder / name).open("a") as file:
                    file.write(json.dumps({"step": step, **record}) + "\n")


def rollout_table(batch: RolloutBatch, step: int) -> dict[str, list[Any]]:
    """Return a batch as columns: text, tokens with their step map and log-probs, rewards, advantage and outcome."""
    trajectory, rewards = batch.trajectory, batch.rewards
    advantage = [None] * len(batch) if batch.advantage_B is None else batch.advantage_B.tolist()
    table: dict[str, list[Any]] = {
        "step": [step] * len(batch),
        "rollout_id": trajectory.rollout_id_B.tolist(),
        "group": batch.group_B.tolist(),
        "prompt": [
            row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"]) for row in batch.rows
        ],
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
    for index, name in enumerate(rewards.names):
        table[f"reward/{name}"] = [None if v != v else v for v in rewards.value_BR[:, index].tolist()]
    for name, values in rewards.extra.items():
        if name != "outcome":
            table[f"extra/{name}"] = [None if value is None else str(value) for value in values]
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
