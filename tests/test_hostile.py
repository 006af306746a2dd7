"""Hostile completions through every reward: no hang, no crash, no process left, every row within its limit."""

from __future__ import annotations

import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from unmask.recipes.registry import SLOTS
from unmask.rewards import RewardTable, build_rewards, sandbox
from unmask.rewards.pool import Job, Pool, Result
from unmask.rewards.sandbox import SandboxError
from unmask.rewards.scoring import Scoring

sys.path.append(str(Path(__file__).parent))
import hostiletexts

# What needs a model, a package or an environment has no text to survive that the others have not.
LEFT_OUT = {"reward_model", "environment", "reasoning_gym"}
LIMIT_S = 1.0
PLAIN_S = 1.0  # of processor time, for a rule-based reward that is not isolated on a megabyte
ROW = {
    "prompt": "p",
    "answer": "5",
    "numbers": [3, 8],
    "target": 11,
    "puzzle": "0" * 16,
    "solution": "1342243141233214",
    "tests": ["assert f(1) == 1"],
    "entry_point": "f",
}


class Watch:
    """A pool that remembers how much of its limit every row took."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.shares = pool, list[float]()

    def submit(self, jobs: list[Job]) -> list[Future[Result]]:
        futures = self.pool.submit(jobs)
        for job, future in zip(jobs, futures, strict=True):
            limit = job.limit_s
            future.add_done_callback(lambda done, limit=limit: self.shares.append(done.result().seconds / limit))
        return futures


def sandboxed() -> bool:
    try:
        sandbox.command()
    except SandboxError:
        return False
    return True


def entries() -> list[dict[str, Any]]:
    """Return every reward, isolated ones with a short limit, programs with a shorter one."""
    knobs = {
        "soft_length": {"limit": 64},
        "code": {"seconds": 0.5},
        "sudoku": {"partial": 0.5},
        "countdown": {"partial": 0.5},
    }
    left_out = LEFT_OUT if sandboxed() else LEFT_OUT | {"code"}
    found = [{"name": name, **knobs.get(name, {})} for name in SLOTS["reward"] if name not in left_out]
    isolated = [reward.isolation is not None for reward in build_rewards(found, allow_code_execution=True)]
    limits = [{"limit_s": 20.0 if entry["name"] == "code" else LIMIT_S} for entry in found]
    return [{**entry, **(limit if far else {})} for entry, limit, far in zip(found, limits, isolated, strict=True)]


def judge(pool: Any, texts: list[str]) -> tuple[RewardTable, dict[str, float]]:
    """Score completions under every reward; return the table and the most processor seconds a row took each here."""
    rewards = build_rewards(entries(), allow_code_execution=True)
    scoring = Scoring(rewards, pool=pool)
    scoring.add([ROW] * len(texts), ["p"] * len(texts), texts, [[0] * 10] * len(texts))
    slowest: dict[str, float] = {}
    for reward in rewards:
        if reward.isolation is None:
            for text in texts:
                started = time.thread_time()
                reward.function(completions=[text], completion_ids=[[0]], **{k: [v] for k, v in ROW.items()})
                slowest[reward.name] = max(slowest.get(reward.name, 0.0), time.thread_time() - started)
    return scoring.table(), slowest


def survive(examples: int, batch: int, number: int = 0) -> dict[str, Any]:
    """Put `examples` batches through every reward and return what became of them; `number` is the seed."""
    # Other tests of this process may have left helpers of multiprocessing, which end with it.
    others = set(psutil.Process().children(recursive=True))
    pool = Pool(workers=2, memory_mb=1024)
    watch, slowest, codes = Watch(pool), dict[str, float](), dict[str, Counter[str]]()
    count = 0

    @seed(number)
    @settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(hostiletexts.completions, min_size=batch, max_size=batch))
    def run(texts: list[str]) -> None:
        nonlocal count
        table, seconds = judge(watch, texts)
        count += len(texts)
        assert len(table) == len(texts) and bool((table.value_BR.isnan() | table.value_BR.isfinite()).all())
        for name, outcomes in table.codes.items():
            codes.setdefault(name, Counter()).update(str(code) for code in outcomes)
        for name, worst in seconds.items():
            slowest[name] = max(slowest.get(name, 0.0), worst)

    try:
        run()
        children = set(psutil.Process().children(recursive=True)) - others
        left = [p.cmdline()[:1] for p in children if p.status() != psutil.STATUS_ZOMBIE]
        return {
            "completions": count,
            "codes": {name: dict(counter) for name, counter in sorted(codes.items())},
            "slowest_in_process_s": slowest,
            "worst_share_of_a_limit": max(watch.shares),
            "rows_in_the_pool": len(watch.shares),
            "workers_replaced": pool.replaced,
            "processes": len(left),
        }
    finally:
        pool.close()
        assert not set(psutil.Process().children(recursive=True)) - others


def check(found: dict[str, Any]) -> None:
    """Assert what holds on any machine; how far rows went past their limits is for the benchmark to say."""
    assert found["processes"] <= 3  # the nursery and two workers
    assert max(found["slowest_in_process_s"].values()) < PLAIN_S, found["slowest_in_process_s"]
    for name, codes in found["codes"].items():
        assert set(codes) <= {"ok", "wrong", "unparsable", "timeout", "error", "None"}, name
    for name in ("arithmetic", "countdown", "sudoku"):
        assert not {"timeout", "error"} & found["codes"][name].keys()


def test_hostile_completions() -> None:
    found = survive(3, 25)
    check(found)
    assert found["completions"] >= 75


@pytest.mark.slow
def test_many_hostile_completions() -> None:
    check(survive(40, 50))
