"""The pool: whatever a reward does in a worker, the row ends within its limit, with a code, and leaves no process."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest

from unmask.recipes.registry import RecipeError
from unmask.rewards import Reward, RewardError, RewardTable, build_rewards, isolated, score
from unmask.rewards.pool import Job, Pool, Result, default_workers
from unmask.rewards.verdicts import Isolation

TESTS = Path(__file__).parent
ACT = {"name": "hostilerewards:act", "isolated": True}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    sys.path.insert(0, str(TESTS))
    made = Pool(workers=2, memory_mb=1024)
    yield made
    made.close()
    sys.path.remove(str(TESTS))
    assert not live_children()


@pytest.fixture(autouse=True, scope="module")
def alone() -> None:
    """End the pools that earlier tests of this process left open: children are counted here, and pools recover."""
    others = psutil.Process().children(recursive=True)
    for process in others:
        process.kill()
    psutil.wait_procs(others, timeout=10)


def live_children() -> list[str]:
    """Return the processes that descend from this one, zombies included (hypothesis and pytest start none)."""
    return [f"{p.pid} {p.status()}" for p in psutil.Process().children(recursive=True)]


def run(pool: Pool, *texts: str, limit_s: float = 10.0, name: str = "act", **columns: Any) -> list[Result]:
    entry = {"name": f"hostilerewards:{name}"}
    jobs = [Job(name, entry, {"completions": [text], **columns}, limit_s) for text in texts]
    return [future.result(60) for future in pool.submit(jobs)]


def table(pool: Pool, entries: list[Any], texts: list[str], **columns: list[Any]) -> RewardTable:
    rows = [{"prompt": f"p{i}", **{k: v[i] for k, v in columns.items()}} for i in range(len(texts))]
    rewards = build_rewards(entries)
    return score(rewards, rows, [row["prompt"] for row in rows], texts, [[1]] * len(texts), pool=pool)


def test_values_come_back_in_order(pool: Pool) -> None:
    texts = [str(n) for n in range(200)]
    assert [result.reply["value"] for result in run(pool, *texts)] == [float(n) for n in range(200)]
    assert {result.attempts for result in run(pool, *texts)} == {1}


@pytest.mark.parametrize(
    ("text", "outcome", "cause"),
    [
        ("kill", "error", "died of SIGKILL"),
        ("exit", "error", "ended with code 3"),
        ("memory", "error", "MemoryError"),
        ("hungry", "error", "MemoryError"),
        ("recursion", "error", "RecursionError"),
        ("raise", "error", "ZeroDivisionError: by zero"),
        ("leave", "error", "SystemExit: 0"),
    ],
)
def test_failures_have_a_code_and_a_cause_after_two_attempts(pool: Pool, text: str, outcome: str, cause: str) -> None:
    before = pool.replaced
    bad, good = run(pool, text, "7")
    assert (bad.outcome, bad.attempts, bad.reply) == (outcome, 2, None) and cause in bad.cause
    assert good.reply["value"] == 7.0
    assert pool.replaced == before + 2  # each attempt cost one worker


@pytest.mark.parametrize("text", ["hang", "sleep"])
def test_a_hung_row_ends_within_its_limit(pool: Pool, text: str) -> None:
    (warm,) = run(pool, "1")
    assert warm.reply is not None
    started = time.monotonic()
    (result,) = run(pool, text, limit_s=0.4)
    assert (result.outcome, result.attempts) == ("timeout", 2)
    assert "no verdict within its 0.4 s" in result.cause
    assert 0.4 <= result.seconds < 0.4 + 0.3 and time.monotonic() - started < 1.5


def test_a_hundred_hung_rows_leave_the_pool_as_it_was(pool: Pool) -> None:
    results = run(pool, *["hang"] * 100, limit_s=0.06)
    assert {(result.outcome, result.attempts) for result in results} == {("timeout", 2)}
    assert [result.reply["value"] for result in run(pool, "1", "2", "3")] == [1.0, 2.0, 3.0]
    statuses = [p.status() for p in psutil.Process().children(recursive=True)]
    assert len(statuses) == 3 and psutil.STATUS_ZOMBIE not in statuses  # the nursery and two workers


def test_what_a_row_started_is_killed_with_it(pool: Pool, tmp_path: Path) -> None:
    note = tmp_path / "ids"
    (result,) = run(pool, "x", limit_s=1.0, name="child", note=[str(note)])
    assert result.outcome == "timeout"
    for process in map(int, note.read_text().split()):
        assert not psutil.pid_exists(process)


def test_a_second_attempt_may_succeed(pool: Pool, tmp_path: Path) -> None:
    note = tmp_path / "attempts"
    (result,) = run(pool, "x", name="second_time", note=[str(note)])
    assert result.reply["value"] == 1.0 and result.attempts == 2 and note.read_text() == "xx"


def test_a_dead_nursery_is_replaced(pool: Pool) -> None:
    """Also while workers hang, who must not outlive it."""
    run(pool, "1")
    jobs = [Job("act", {"name": "hostilerewards:act"}, {"completions": ["hang"]}, 2.0)]
    futures = pool.submit(jobs * 2)
    (nursery,) = psutil.Process().children()
    workers = nursery.children()
    nursery.kill()
    assert [result.reply["value"] for result in run(pool, "4", "5", "6")] == [4.0, 5.0, 6.0]
    assert {future.result(60).outcome for future in futures} <= {"timeout", "error"}
    assert workers and not any(worker.is_running() for worker in workers)


def test_from_a_thread_and_from_a_running_loop(pool: Pool) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(pool, "sleep", "3", limit_s=0.2)))
    thread.start()
    thread.join()

    async def notebook() -> list[Result]:
        jobs = [Job("act", {"name": "hostilerewards:act"}, {"completions": [t]}, 0.2) for t in ("hang", "4")]
        return list(await asyncio.gather(*map(asyncio.wrap_future, pool.submit(jobs))))

    found.append(asyncio.run(notebook()))
    for expected, (hung, fine) in zip((3.0, 4.0), found, strict=True):
        assert hung.outcome == "timeout" and fine.reply["value"] == expected


def test_failed_rows_are_excluded_not_punished(pool: Pool) -> None:
    entries = [{**ACT, "limit_s": 0.4}, {"name": "hostilerewards:later", "weight": 0.5}]
    got = table(pool, entries, ["2", "hang", "none", "raise"])
    assert got.outcome == ["ok", "timeout", "ok", "error"]
    assert got.total_B[0] == 2.5 and got.total_B[2] == 2.0 and got.total_B[[1, 3]].isnan().all()
    assert got.value_BR[:, 0].isnan().tolist() == [False, True, True, True]
    assert got.codes == {"act": [None, "timeout", None, "error"]}
    assert got.extra["cause"][0] is None and "ZeroDivisionError" in got.extra["cause"][3]
    unweighed = table(pool, [{**ACT, "weight": 0.0}, "hostilerewards:later"], ["raise"])
    assert unweighed.total_B.tolist() == [5.0]


def test_a_failing_truth_excludes_nothing(pool: Pool) -> None:
    got = table(pool, [{**ACT, "truth": True}, {"name": "hostilerewards:later"}], ["4", "raise"])
    assert got.total_B.tolist() == [1.0, 5.0] and got.outcome == ["ok", "ok"]
    assert got.truths == ("act",) and got.value_BR[0, 0] == 4.0 and math.isnan(got.value_BR[1, 0])


def test_rows_and_logs_pass_unchanged(pool: Pool) -> None:
    numbers = [[1, 2.5, None], {"a": "\ud800\x00é"}, numpy.arange(3), ""]
    got = table(pool, ["hostilerewards:logs"], ["a", "bb", "ccc", "d"], numbers=numbers)
    assert got.extra["seen"] == [
        ["p0", "a", [1, 2.5, None]],
        ["p1", "bb", {"a": "\ud800\x00é"}],
        ["p2", "ccc", [0, 1, 2]],
        ["p3", "d", ""],
    ]
    assert got.outcome == ["ok", "ok", "ok", "wrong"] and got.metrics == {"size": 7 / 4}


def test_an_asynchronous_reward_and_a_factory_in_a_worker(pool: Pool) -> None:
    entries = [
        {"name": "hostilerewards:later", "isolated": True},
        {"name": "hostilerewards:make", "value": 0.25, "isolated": True},
    ]
    assert table(pool, entries, ["abc", "de"]).value_BR.tolist() == [[3.0, 0.25], [2.0, 0.25]]


def test_what_the_user_has_to_correct_stops_the_run(pool: Pool) -> None:
    with pytest.raises(RewardError, match="column 'x' holds nonsense"):
        table(pool, [ACT], ["1", "refuse"])
    with pytest.raises(RewardError, match=r"'short' returned 0 values for 1 completions"):
        table(pool, [{"name": "hostilerewards:short", "isolated": True}], ["1"])
    jobs = [Job("gone", {"name": "hostilerewards:gone"}, {"completions": ["x"]}, 1.0)]
    with pytest.raises(RewardError, match=r"reward 'gone': .*cannot import 'hostilerewards:gone'"):
        pool.submit(jobs)[0].result(60)
    jobs = [Job("act", {"name": "hostilerewards:act"}, {"completions": ["1"]}, 1.0, ("no_such_library",))]
    lonely = Pool(workers=1)
    with pytest.raises(RewardError, match=r"cannot be imported \(ModuleNotFoundError"):
        lonely.submit(jobs)[0].result(60)
    lonely.close()
    with pytest.raises(RewardError, match="closed"):
        lonely.submit(jobs)


def test_closing_ends_what_hangs(pool: Pool) -> None:
    other = Pool(workers=1)
    futures = other.submit([Job("act", {"name": "hostilerewards:act"}, {"completions": ["hang"]}, 60.0)] * 2)
    while not futures[0].running():
        time.sleep(0.01)
    other.close()
    for future in futures:
        with pytest.raises(RewardError, match="closed before"):
            future.result(1)


def test_prints_stay_off_standard_output(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    other = Pool(workers=1)
    run(other, "print")
    other.close()
    printed = capfd.readouterr()
    assert "xxx" not in printed.out and "xxx" in printed.err and "yyy" in printed.err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_killed_trainer(number: int) -> None:
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import hostilerewards; hostilerewards.holder()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 3
        os.kill(parent.pid, number)
        parent.wait(30)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(map(psutil.pid_exists, processes)):
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, processes))


def test_marks_and_entries() -> None:
    [plain] = build_rewards(["answer_format"])
    [asked] = build_rewards([{"name": "answer_format", "style": "boxed", "isolated": True, "limit_s": 3}])
    assert plain.isolation is None
    assert asked.isolation == Isolation(3.0) and asked.entry == {"name": "answer_format", "style": "boxed"}
    with pytest.raises(RecipeError, match=r"rewards\[0\].limit_s: has no effect on a reward that is not isolated"):
        build_rewards([{"name": "answer_format", "limit_s": 3}])
    with pytest.raises(RecipeError, match="limit_s: 0 must be above 0"):
        build_rewards([{"name": "answer_format", "isolated": True, "limit_s": 0}])

    @isolated()
    def local(completions: list[str]) -> list[float]:
        return [0.0]

    with pytest.raises(RecipeError, match=r"rewards.local: 'local' of .* cannot be imported by another process"):
        build_rewards([local])


def test_marked_functions_keep_their_mark_and_may_not_lose_it(pool: Pool) -> None:
    import hostilerewards

    assert build_rewards([hostilerewards.logs])[0].entry == {"name": "hostilerewards:logs"}
    assert Reward("n", hostilerewards.act, isolation=Isolation()).entry == {"name": "hostilerewards:act"}
    with pytest.raises(RecipeError, match="always runs in the pool"):
        build_rewards([{"name": "hostilerewards:logs", "isolated": False}])


def test_truths_carry_no_weight() -> None:
    [_, truth] = build_rewards(["answer_format", {"name": "arithmetic", "truth": True}])
    assert truth.truth and truth.weight == 0.0
    with pytest.raises(RecipeError, match="a `truth` is never trained on"):
        build_rewards(["answer_format", {"name": "arithmetic", "truth": True, "weight": 1.0}])
    with pytest.raises(RecipeError, match="nothing would be learnt"):
        build_rewards([{"name": "arithmetic", "truth": True}])


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 4
