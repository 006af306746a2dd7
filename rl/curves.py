"""Which records of a run are drawn together in its report, and what is computed from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .figures import Curve, Figure


@dataclass(frozen=True)
class Wanted:
    """A figure of the metrics whose whole names match `pattern`; `drop` is cut from the front of their names."""

    title: str
    pattern: str
    note: str
    drop: str = ""
    log: bool = False
    level: float | None = None


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: Sequence[Any]


EXACT, ETA = "Held-out exact rate, 95 % interval", "Time to the end, as foreseen at each step (minutes)"
# In the order of the page. A note says what to look for.
SECTIONS = (
    Section(
        "Held-out problems",
        (
            Wanted(EXACT, "eval/exact", "The number that counts; everything below only explains it."),
            Wanted("Held-out rewards", "eval/(reward|truth)/.+", "Means of each reward.", drop="eval/"),
        ),
    ),
    Section(
        "Rewards of the rollouts",
        (
            Wanted("Total reward", "reward/total", "What is trained on: the weighted sum."),
            Wanted("Each reward", "reward/(?!total$).+", "One that rises alone is being gamed.", drop="reward/"),
            Wanted(
                "Truth against proxy",
                "truth/.+|reward/total",
                "The truth is never trained on; a gap that widens is hacking.",
            ),
            Wanted(
                "Outcomes", "outcome/(ok|wrong|unparsable|timeout|error)", "Shares of the rollouts.", drop="outcome/"
            ),
            Wanted(
                "Rollouts without signal",
                "advantage/zero_share",
                "Near 1, problems are too easy or too hard.",
                level=1.0,
            ),
        ),
    ),
    Section(
        "Rollouts",
        (
            Wanted("Calls of the model a rollout (NFE)", "rollout/nfe", "Falls when answers get shorter."),
            Wanted("Tokens of a completion", "rollout/length", "A drift without reward is a warning."),
            Wanted("Entropy of scored tokens (nats)", "train/entropy", "At 0 the policy has stopped exploring."),
        ),
    ),
    Section(
        "Updates",
        (
            Wanted(
                "Importance ratio, percentiles",
                "train/ratio_p.+",
                "Spreads as inner steps go on.",
                "train/ratio_",
                level=1.0,
            ),
            Wanted("Units whose ratio is clipped", "train/clip_fraction", "A few per cent is usual."),
            Wanted(
                "Trainer against rollout, |log-prob| (nats)",
                "train/mismatch_.+|mismatch/(kl|max)",
                "Exact rollouts in one precision stay near rounding.",
                drop="train/",
                log=True,
            ),
            Wanted(
                "KL", "train/kl|train/kl_old", "kl: from the reference; kl_old: from the policy that sampled.", "train/"
            ),
            Wanted("Gradient norm, before clipping", "grad_norm", "Spikes announce a run that breaks.", log=True),
            Wanted("Learning rate", "learning_rate", ""),
        ),
    ),
    Section(
        "Speed and memory",
        (
            Wanted(
                "Seconds a step", "time/(rollout|update|step)_s", "A step without rollouts reuses a batch.", "time/"
            ),
            Wanted("Tokens a second of the rollouts", "time/tokens_per_s", "All ranks together."),
            Wanted("Peak memory (GB)", "time/memory_gb", "Of the device, or of the process on a CPU; first rank."),
            Wanted(
                ETA, "", "Mean step so far times steps; the dotted line is what it took. A flat line is an honest one."
            ),
        ),
    ),
)


def figures_of(records: Sequence[dict[str, Any]], steps: int | None) -> list[Section]:
    """Return the sections with the figures that `records` (ascending steps) have values for."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                found = series.setdefault(name, ([], []))
                found[0].append(record["step"])
                found[1].append(value)
    sections = [Section(s.title, [f for w in s.figures if (f := _figure(w, series, steps)).curves]) for s in SECTIONS]
    return [section for section in sections if section.figures]


def _figure(wanted: Wanted, series: dict[str, tuple[list[float], list[float]]], steps: int | None) -> Figure:
    """Return the figure of what matches, without curves where nothing does."""
    figure = Figure(wanted.title, [], wanted.note, log=wanted.log, level=wanted.level)
    if wanted.title == ETA:
        return _foreseen(figure, series, steps)
    names = [name for name in series if re.fullmatch(wanted.pattern, name)]
    if wanted.title == "Truth against proxy" and not any(name.startswith("truth/") for name in names):
        return figure
    curves = [Curve(name.removeprefix(wanted.drop), *series[name]) for name in names]
    if wanted.title == EXACT and curves and "eval/stderr" in series:
        curves = [replace(curves[0], errors=series["eval/stderr"][1])]
    return replace(figure, curves=curves)


def _foreseen(figure: Figure, series: dict[str, tuple[list[float], list[float]]], steps: int | None) -> Figure:
    """Return the whole run's time as each step foresaw it: the mean step so far, evaluations included, times steps."""
    if steps is None or "time/step_s" not in series:
        return figure
    spent = sorted(
        [*zip(*series["time/step_s"], strict=True), *zip(*series.get("time/eval_wall_s", ([], [])), strict=True)]
    )
    total, at, foreseen = 0.0, [], []
    for step, seconds in spent:
        total += seconds
        if step:
            at.append(step)
            foreseen.append(total / step * steps / 60)
    finished = bool(at) and at[-1] >= steps
    return replace(figure, curves=[Curve("foreseen", at, foreseen)], level=total / 60 if finished else None)
