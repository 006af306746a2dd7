"""Rewards: rule-based scores of completions, TRL's reward signature, and the table a trainer reads.

Importing this package registers the built-in parts of slot "reward". They are *factories*: their keyword-only
parameters are the knobs of a recipe and they return the reward function, so that TRL's own arguments are never
mistaken for knobs.
"""

from . import countdown, formatting, mathematics, sudoku
from .building import Reward, build_rewards, check_columns
from .scoring import RewardTable, score
from .verdicts import OUTCOMES, RewardError

__all__ = [
    "OUTCOMES",
    "Reward",
    "RewardError",
    "RewardTable",
    "build_rewards",
    "check_columns",
    "countdown",
    "formatting",
    "mathematics",
    "score",
    "sudoku",
]
