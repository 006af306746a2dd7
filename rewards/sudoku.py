"""Reward of 4x4 sudoku: any valid completion of the given clues is right."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

from ..recipes.registry import SLOTS
from .extraction import Extract, extract_answer
from .verdicts import LogExtra, RewardFunction, Verdict, check_share, column_error, report, text_of

_ROWS = [tuple(range(4 * row, 4 * row + 4)) for row in range(4)]
_COLUMNS = [tuple(range(column, 16, 4)) for column in range(4)]
_BOXES = [(corner, corner + 1, corner + 4, corner + 5) for corner in (0, 2, 8, 10)]
UNITS = (*_ROWS, *_COLUMNS, *_BOXES)


@SLOTS["reward"].register
def sudoku(*, extract: Extract = "gsm8k_hash", partial: float = 0.0) -> RewardFunction:
    """1 for 16 digits that keep the clues of column `puzzle` (16 digits, 0 = blank) and obey the rules of 4x4 sudoku.

    `extract` says where the answer stands; blanks and line ends inside it are ignored. `partial`, in [0, 1), is
    multiplied by the share of blank cells filled as in the nearest valid completion, for wrong answers that keep the
    clues. Outcomes: ok, wrong, unparsable (no answer, or not 16 digits).
    """
    check_share("sudoku", "partial", partial)

    def sudoku_reward(
        completions: list[Any], puzzle: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        rows = zip(completions, puzzle, strict=True)
        return report([judge_sudoku(text_of(text), clues, extract, partial) for text, clues in rows], log_extra)

    return sudoku_reward


def judge_sudoku(text: str, puzzle: Any, extract: Extract = "gsm8k_hash", partial: float = 0.0) -> Verdict:
    """Judge one completion; raises RewardError when the row's `puzzle` is not a string of 16 digits from 0 to 4."""
    if puzzle is None:
        return Verdict()
    clues = "".join(puzzle.split()) if isinstance(puzzle, str) else ""
    if not re.fullmatch(r"[0-4]{16}", clues):
        raise column_error("sudoku", "puzzle", puzzle, "which is not a string of 16 digits from 0 (blank) to 4")
    answer = extract_answer(text, extract)
    grid = "".join((answer or "").split())
    if not re.fullmatch(r"[0-9]{16}", grid):
        return Verdict(0.0, "unparsable", answer)
    if not keeps_clues(grid, clues):
        return Verdict(0.0, "wrong", answer)
    if is_valid(grid):
        return Verdict(1.0, "ok", answer)
    return Verdict(partial * nearest_share(grid, clues) if partial else 0.0, "wrong", answer)


def keeps_clues(grid: str, clues: str) -> bool:
    """Tell whether `grid` has every non-blank digit of `clues` in its place."""
    return all(clue in ("0", digit) for clue, digit in zip(clues, grid, strict=True))


def is_valid(grid: str) -> bool:
    """Tell whether every row, column and box of `grid` (16 characters) holds 1, 2, 3 and 4."""
    return all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


@functools.cache
def valid_grids() -> tuple[str, ...]:
    """Return all 288 completed 4x4 grids."""
    rows = ["".join(digits) for digits in itertools.permutations("1234")]
    grids = [""]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _repeats_nothing(grid + row)]
    return tuple(grids)


def _repeats_nothing(grid: str) -> bool:
    """Tell whether no unit of `grid`, whose last rows may be missing, holds a digit twice."""
    filled = ([grid[cell] for cell in unit if cell < len(grid)] for unit in UNITS)
    return all(len(set(digits)) == len(digits) for digits in filled)


def nearest_share(grid: str, clues: str) -> float:
    """Return the largest share of the blanks of `clues` on which `grid` agrees with a valid completion (0 if none)."""
    blanks = [cell for cell in range(16) if clues[cell] == "0"]
    completions = (solution for solution in valid_grids() if keeps_clues(solution, clues))
    agreement = (sum(grid[cell] == solution[cell] for cell in blanks) for solution in completions)
    return max(agreement, default=0) / max(len(blanks), 1)
