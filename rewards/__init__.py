"""Rewards: rule-based scores of completions, TRL's reward signature, and the table a trainer reads.

Importing this package registers the built-in parts of slot "reward". They are *factories*: their keyword-only
parameters are the knobs of a recipe and they return the reward function, so that TRL's own arguments are never
mistaken for knobs.
"""

from . import countdown, formatting, judges, mathematics, programs, published, reasoning, sudoku, verification
from .building import Reward, build_rewards, check_columns
from .scorer import Scorer, ScoringConfig
from .scoring import RewardTable, score
from .verdicts import OUTCOMES, Isolation, RewardError, isolated

__all__ = [
    "OUTCOMES",
    "Isolation",
    "Reward",
    "RewardError",
    "RewardTable",
    "Scorer",
    "ScoringConfig",
    "build_rewards",
    "check_columns",
    "countdown",
    "formatting",
    "isolated",
    "judges",
    "mathematics",
    "programs",
    "published",
    "reasoning",
    "score",
    "sudoku",
    "verification",
]
