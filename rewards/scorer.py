"""Scorer: a run's rewards with the settings of its recipe: pool, code execution, and how many failures are too many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..recipes.registry import RecipeError, nearest
from .building import Reward
from .pool import shared_pool
from .scoring import RewardTable, Scoring
from .verdicts import OUTCOMES, RewardError

WINDOW, LEAST = 1024, 64  # verdicts a rate is taken over: the last 1024, once there are 64
LIMITS = {"timeout": 0.05, "error": 0.05}


@dataclass(frozen=True)
class ScoringConfig:
    """Settings of scoring.

    `workers` processes judge isolated rewards (0: one a core), each with `memory_mb` MB. `limits` are the largest
    shares of a reward's verdicts with an outcome code; above one of them the run stops. Rewards that run code which a
    model wrote need `allow_code_execution`.
    """

    workers: int = 0
    memory_mb: int = 2048
    limits: Mapping[str, float] = field(default_factory=lambda: dict(LIMITS))
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        for code, limit in self.limits.items():
            if code not in OUTCOMES:
                raise RecipeError(f"scoring.limits: '{code}' is no outcome code.{nearest(code, list(OUTCOMES))}")
            if not 0 <= limit <= 1:
                raise RecipeError(f"scoring.limits.{code}: {limit!r} is no share; it must lie in [0, 1].")


class Scorer:
    """Scores rollouts with `rewards`: a whole batch at once when called, or in chunks by `begin` and `finish`.

    Rewards that need something of the machine (a sandbox, a server) are asked for it here, before the first rollout;
    RewardError where it is not there. `state` gives reward functions their `trainer_state`.
    """

    def __init__(
        self, rewards: Sequence[Reward], config: ScoringConfig | None = None, *, state: Callable[[], Any] | None = None
    ) -> None:
        self.rewards, self.config, self.state = list(rewards), config or ScoringConfig(), state
        self._recent: dict[str, deque[str]] = {}
        self._causes: Counter[tuple[str, str, str]] = Counter()
        for reward in self.rewards:
            ready = getattr(reward.function, "ready", None)
            if ready is not None:
                ready()

    def __call__(
        self, rows: Sequence[Any], prompts: Sequence[Any], completions: Sequence[Any], ids: Sequence[Sequence[int]]
    ) -> RewardTable:
        """Return the table of one batch."""
        scoring = self.begin()
        scoring.add(rows, prompts, completions, ids)
        return self.finish(scoring)

    def begin(self) -> Scoring:
        """Return the scoring of a batch whose rollouts are added as they come."""
        isolated = any(reward.isolation for reward in self.rewards)
        pool = shared_pool(self.config.workers, self.config.memory_mb) if isolated else None
        return Scoring(self.rewards, trainer_state=self.state() if self.state else None, pool=pool)

    def finish(self, scoring: Scoring) -> RewardTable:
        """Return the table; RewardError when an outcome has become more frequent than its limit."""
        table = scoring.table()
        self._check(table)
        return table

    def _check(self, table: RewardTable) -> None:
        for name, codes in table.codes.items():
            recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
            causes = table.extra.get(f"{name}/cause", table.extra.get("cause", [None] * len(codes)))
            for code, cause in zip(codes, causes, strict=True):
                # A row that the reward reports nothing about counts: it was judged, or passed over, without failing.
                recent.append(code or "")
                if cause is not None:
                    self._causes[name, code or "", str(cause)] += 1
            for code, limit in self.config.limits.items():
                rate = recent.count(code) / max(len(recent), 1)
                if len(recent) >= LEAST and rate > limit:
                    raise RewardError(self._explain(name, code, rate, limit, len(recent)))

    def _explain(self, name: str, code: str, rate: float, limit: float, count: int) -> str:
        known = [(times, cause) for (of, what, cause), times in self._causes.items() if (of, what) == (name, code)]
        reason = f"most often: {max(known)[1]}" if known else "it gave no cause"
        return (
            f"reward '{name}': {rate:.1%} of its last {count} verdicts are '{code}', scoring.limits.{code} is "
            f"{limit:.1%}; {reason:.300}. Correct the cause, or raise the limit."
        )
