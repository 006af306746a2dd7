"""reasoning-gym's scorers, run in the sandbox: some of them evaluate what a model wrote."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipes.registry import SLOTS
from . import sandbox
from .extraction import Extract, Rules, extract_answer
from .sandbox import Answer, Limits, Loading, SandboxError
from .verdicts import LogExtra, RewardError, RewardFunction, check_share, column_error, text_of

# A scorer that evaluates text evaluates it beside the score, so text that could be more than an answer is none.
_CODE = re.compile(r"__|\b(?:import|lambda|exec|eval|getattr|setattr|globals|locals|vars|open|compile|breakpoint)\b")
MAX_ANSWER = 4096
PREAMBLE = """
import os
os.environ.update(HOME="/tmp", MPLCONFIGDIR="/tmp", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MPLBACKEND="agg")
import json
import sys
import reasoning_gym
"""
SCORER = """
task = json.loads(sys.stdin.read())
data = reasoning_gym.create_dataset(task["dataset"], seed=task["seed"], size=task["size"], **task["config"])
entry = data[task["index"]]
out = sys.stdout
sys.stdout = sys.stderr
score = float(data.score_answer(task["answer"], entry))
out.write(repr(score))
out.flush()
"""


@SLOTS["reward"].register
def reasoning_gym(
    *,
    extract: Extract = "answer_tag",
    rules: Rules = 1,
    partial: float = 0.0,
    seconds: float = 4.0,
    memory_mb: int = 4096,
) -> RewardFunction:
    """1 for an answer to which reasoning-gym's own scorer gives 1, `partial` times its score for any other.

    For rows of the task `reasoning_gym` (column `gym`). The scorers run in the bubblewrap sandbox, an answer in a
    process of its own with `seconds` of wall clock; text that could be code is no answer. Needs the package
    reasoning-gym. Outcomes: ok, wrong (also: the scorer fails on it), unparsable, error (the sandbox fails).
    """
    check_share("reasoning_gym", "partial", partial)
    limits = Limits(seconds, memory_mb, processes=16, output_kb=1)

    async def reasoning_gym_reward(
        completions: list[Any], gym: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        found = [extract_answer(text_of(text), extract, rules) for text in completions]
        asked = [row for row, answer in enumerate(found) if gym[row] is not None and is_answer(answer)]
        tasks = [json.dumps({**_entry(gym[row]), "answer": found[row]}) for row in asked]
        answers = await asyncio.to_thread(_run, tasks, limits) if tasks else []
        values: list[float | None] = [None if entry is None else 0.0 for entry in gym]
        outcomes = [None if entry is None else "unparsable" for entry in gym]
        for row, answer in zip(asked, answers, strict=True):
            values[row], outcomes[row] = _verdict(answer, partial)
        if log_extra is not None:
            log_extra("outcome", outcomes)
            log_extra("extracted", found)
        return values

    reasoning_gym_reward.ready = ready  # type: ignore[attr-defined]
    return reasoning_gym_reward


def is_answer(text: str | None) -> bool:
    """Tell whether a text may be given to a scorer."""
    return text is not None and len(text) <= MAX_ANSWER and _CODE.search(text) is None


def _entry(column: Any) -> dict[str, Any]:
    try:
        entry = json.loads(column) if isinstance(column, str) else dict(column)
        return {key: entry[key] for key in ("dataset", "config", "seed", "size", "index")}
    except (ValueError, KeyError, TypeError) as error:
        rule = f"which is no row of the task reasoning_gym ({error})"
        raise column_error("reasoning_gym", "gym", column, rule) from error


def _verdict(answer: Answer, partial: float) -> tuple[float | None, str]:
    if answer.cause is not None and answer.cause.startswith("the program:"):
        return None, "error"  # the sandbox was lost, perhaps by another answer
    try:
        score = float(answer.value) if answer.cause is None else 0.0
    except ValueError:
        score = 0.0
    if not 0 <= score <= 1:
        score = 0.0
    return (1.0, "ok") if score == 1 else (partial * score, "wrong")


def libraries() -> tuple[str, ...]:
    """Return the folders from which the sandbox imports reasoning_gym and what it needs; SandboxError without it."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise SandboxError(
            "reward 'reasoning_gym': the package is not installed; `pip install 'unmask[reasoning-gym]'`."
        )
    folders = [Path(spec.origin).parent.parent]
    for needed in ("sympy", "numpy"):
        found = importlib.util.find_spec(needed)
        if found is not None and found.origin is not None:
            folders.append(Path(found.origin).parent.parent)
    return tuple(dict.fromkeys(map(str, folders)))


def _run(tasks: Sequence[str], limits: Limits) -> list[Answer]:
    answers = sandbox.run_inputs(SCORER, tasks, limits, Loading(PREAMBLE, libraries()))
    causes = {answer.cause for answer in answers}
    if len(causes) == 1 and any(name in str(causes) for name in ("ImportError", "ModuleNotFoundError")):
        raise RewardError(f"reward 'reasoning_gym': the sandbox's interpreter cannot import it ({causes.pop()}).")
    return answers


def ready() -> None:
    """Raise SandboxError unless the sandbox runs and imports reasoning_gym."""
    (answer,) = sandbox.run_inputs(
        "print(reasoning_gym.__name__)", [""], Limits(20.0, 4096), Loading(PREAMBLE, libraries())
    )
    if answer.cause is not None:
        raise SandboxError(f"reward 'reasoning_gym': the sandbox cannot use the package ({answer.cause}).")
