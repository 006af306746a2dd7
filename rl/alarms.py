"""Alarms: what a run's own records say when it is gamed, has stopped exploring, or has nothing left to learn from.

Each is a function of the records so far and its section of the recipe that returns what to say, or None. What is heard
is a pure function of `metrics.jsonl`, so that a resumed run warns as one that ran through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..recipes.sections import AlarmsSection, EmptyAlarm, EntropyAlarm, GamingAlarm, SilentAlarm

ALARM = "alarm/"  # a record's key for what an alarm says, where it begins
Record = dict[str, Any]


@dataclass
class History:
    """The records of a run by what they hold, oldest first; one may hold an update and a batch."""

    updates: list[Record] = field(default_factory=list)
    batches: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take in the next record, which has a `step`."""
        for found, key in ((self.updates, "loss"), (self.batches, "reward/total"), (self.evaluations, "eval/exact")):
            if key in record:
                found.append(record)


def gaming(history: History, asked: GamingAlarm) -> str | None:
    """Return what to say when batch rewards rose and a held-out truth fell over the last evaluations, else None.

    Truths are the measures so marked in the recipe, or the exact rate where there are none. A truth falls when the last
    evaluation lies below the first by more than `errors` standard errors of their difference (as if their problems were
    different ones); rewards rise when the mean over the later half of the batches between them exceeds that over the
    earlier half by as much.
    """
    held = history.evaluations[-asked.evaluations :]
    if len(held) < asked.evaluations:
        return None
    first, last = held[0], held[-1]
    rewards = [r["reward/total"] for r in history.batches if first["step"] < r["step"] <= last["step"]]
    half = len(rewards) // 2
    early, late = _mean_and_error(rewards[:half]), _mean_and_error(rewards[half:])
    if half < 2 or not late[0] - early[0] > asked.errors * math.hypot(early[1], late[1]):
        return None
    truths = {name: name.replace("eval/", "eval/stderr/") for name in last if name.startswith("eval/truth/")}
    for name, error in (truths or {"eval/exact": "eval/stderr"}).items():
        before, now = (record.get(name, math.nan) for record in (first, last))
        if before - now > asked.errors * math.hypot(*(record.get(error, math.nan) for record in (first, last))):
            return (
                f"rewards of the rollouts rose from {early[0]:.3g} to {late[0]:.3g} while held-out "
                f"{name.removeprefix('eval/')} fell from {before:.3g} to {now:.3g} since update {first['step']}: a "
                "reward is being gamed; read rollouts of high reward (unmask view)"
            )
    return None


def entropy(history: History, asked: EntropyAlarm) -> str | None:
    """Return what to say when the entropy of scored tokens was low in the last updates that all scored some."""
    # A planner's updates count steps in place of tokens.
    last = [r for r in history.updates[-asked.updates :] if r.get("train/tokens", r.get("train/steps"))]
    values = [record["train/entropy"] for record in last if "train/entropy" in record]
    if len(values) < asked.updates or not max(values) < asked.below:
        return None
    return (
        f"the entropy is {values[-1]:.2g} nats, below {asked.below:g} for {asked.updates} updates: rollouts of a group "
        "are alike; raise rollout.temperature or objective.beta, or go back to an earlier checkpoint"
    )


def empty(history: History, asked: EmptyAlarm) -> str | None:
    """Return what to say when many completions of the last batches were empty."""
    share = _stayed(history.batches, "rollout/empty", asked)
    if share is None:
        return None
    return (
        f"{share:.0%} of the completions are EOS alone or blank, above {asked.above:.0%} for {asked.batches} "
        "batches: check what they earn (unmask reward check), or set rollout.sampler.eos.suppress"
    )


def silent(history: History, asked: SilentAlarm) -> str | None:
    """Return what to say when hardly a rollout of the last batches had an advantage."""
    share = _stayed(history.batches, "advantage/zero_share", asked)
    if share is None:
        return None
    return (
        f"{share:.0%} of the rollouts have advantage 0, above {asked.above:.0%} for {asked.batches} batches: "
        "problems are all solved or all failed; take harder or easier ones, a larger rollout.group, or exploration"
    )


ALARMS: dict[str, Callable[[History, Any], str | None]] = {
    "gaming": gaming,
    "entropy": entropy,
    "empty": empty,
    "silent": silent,
}


class Alarms:
    """Hears a run's records one by one; `on` holds the alarms that hold now and what they say."""

    def __init__(self, section: AlarmsSection) -> None:
        self.section, self.history, self.on = section, History(), dict[str, str]()

    def begin(self, records: Sequence[Record], step: int) -> None:
        """Forget what was heard, and hear the records up to `step` that a run has written before."""
        self.history, self.on = History(), {}
        for record in records:
            if record["step"] <= step:
                self.hear(record)

    def hear(self, record: Record) -> dict[str, str]:
        """Return the alarms that begin with this record, and what they say."""
        self.history.add(record)
        asked = {name: getattr(self.section, name) for name in ALARMS}
        said = {name: ALARMS[name](self.history, own) for name, own in asked.items() if own is not None}
        before, self.on = self.on, {name: text for name, text in said.items() if text is not None}
        return {name: text for name, text in self.on.items() if name not in before}

    def stopping(self) -> dict[str, str]:
        """Return the alarms that hold now and are to stop the run."""
        return {name: text for name, text in self.on.items() if getattr(self.section, name).stop}


def _stayed(batches: Sequence[Record], key: str, asked: EmptyAlarm | SilentAlarm) -> float | None:
    """Return the last batch's share under `key` where it was above the bar in as many batches as are asked for."""
    values = [record[key] for record in batches[-asked.batches :] if key in record]
    return values[-1] if len(values) == asked.batches and min(values) > asked.above else None


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error, NaN where there are too few values."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else math.nan
    return mean, error
