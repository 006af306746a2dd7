"""The pool: whatever a reward does in a worker, the row ends within its limit, with a code, and leaves no process."""

from __future__ import annotations

import asyncio
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest

from unmask.recipes.registry import RecipeError
from unmask.rewards import Reward, RewardError, RewardTable, build_rewards, isolated, score
from unmask.rewards.pool import Job, Pool, Result, allowance
from unmask.rewards.processes import Worker, default_workers
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
    psutil.wait_procs(others, timeout=60)


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
    bad, good = run(pool, text, "7", limit_s=60.0)  # reached by none: a busy machine takes its time to fill the memory
    assert (bad.outcome, bad.attempts, bad.reply) == (outcome, 2, None) and cause in bad.cause
    assert good.reply["value"] == 7.0
    assert pool.replaced == before + 2  # each attempt cost one worker


@pytest.mark.parametrize("text", ["hang", "sleep"])
def test_a_hung_row_is_tried_twice_and_given_up(pool: Pool, text: str) -> None:
    """How far behind the limit the pool looks is the machine's; benchmarks/hostile.py measures it."""
    (result,) = run(pool, text, limit_s=0.4)
    assert (result.outcome, result.attempts) == ("timeout", 2)
    assert "no verdict within its 0.4 s" in result.cause and result.seconds >= 0.4


def test_both_attempts_share_the_limit() -> None:
    assert allowance(0.4, 0.0, 0) == 0.2 and allowance(0.4, 0.2, 1) == 0.2
    assert allowance(10.0, 0.5, 1) == 9.5  # it crashed early


class Clock:
    """The pool's clock, which a test can put forward, as if the machine had been busy with something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        monkeypatch.setattr("unmask.rewards.pool.time", SimpleNamespace(monotonic=self.monotonic))

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_a_pool_that_looks_late_still_tries_a_row_twice(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pool, "1")
    clock, before = Clock(monkeypatch), pool.replaced
    (future,) = pool.submit([Job("act", {"name": "hostilerewards:act"}, {"completions": ["sleep"]}, 0.4)])
    while not future.running():
        time.sleep(0.001)
    clock.ahead = 100.0
    result = future.result(60)
    assert (result.outcome, result.attempts) == ("timeout", 2) and pool.replaced == before + 2
    assert result.seconds >= 100.0


def test_an_answer_that_came_in_time_counts_however_late_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one answer is read, the other row is answered and its deadline passes."""
    other, note = Pool(workers=2), tmp_path / "now"
    clock, read = Clock(monkeypatch), Worker.read

    def slow_read(worker: Worker) -> Any:
        workers = [w for w in other._crew.workers.values() if w is not worker and w.task is not None]
        if not worker.preparing and workers:
            note.touch()
            assert select.select([workers[0].connection], [], [], 60)[0]
            clock.ahead += 1000.0
        return read(worker)

    entry = {"name": "hostilerewards:after"}
    jobs = [Job("after", entry, {"completions": ["x"], "note": [path]}, 100.0) for path in (str(TESTS), str(note))]
    [future.result(60) for future in other.submit([jobs[0]] * 2)]  # both workers are there
    monkeypatch.setattr(Worker, "read", slow_read)
    results = [future.result(60) for future in other.submit(jobs)]
    assert [(result.outcome, result.attempts) for result in results] == [(None, 1), (None, 1)]
    other.close()


def test_a_hundred_hung_rows_leave_the_pool_as_it_was(pool: Pool) -> None:
    results = run(pool, *["hang"] * 100, limit_s=0.06)
    assert {(result.outcome, result.attempts) for result in results} == {("timeout", 2)}
    assert [result.reply["value"] for result in run(pool, "1", "2", "3")] == [1.0, 2.0, 3.0]
    statuses = [p.status() for p in psutil.Process().children(recursive=True)]
    assert len(statuses) == 3 and psutil.STATUS_ZOMBIE not in statuses  # the nursery and two workers


def test_what_a_row_started_is_killed_with_it(pool: Pool, tmp_path: Path) -> None:
    note = tmp_path / "ids"
    (result,) = run(pool, "x", limit_s=60.0, name="child", note=[str(note)])
    assert result.outcome == "error" and "SIGKILL" in result.cause
    processes = [int(word) for word in note.read_text().split()]
    assert len(processes) == 6 and not any(map(psutil.pid_exists, processes))  # two attempts


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

    def jobs(hung: str, fine: str) -> list[Job]:
        entry = {"name": "hostilerewards:act"}
        return [Job("act", entry, {"completions": [text]}, limit) for text, limit in ((hung, 0.2), (fine, 60.0))]

    thread = threading.Thread(target=lambda: found.append([f.result(60) for f in pool.submit(jobs("sleep", "3"))]))
    thread.start()
    thread.join()

    async def notebook() -> list[Result]:
        return list(await asyncio.gather(*map(asyncio.wrap_future, pool.submit(jobs("hang", "4")))))

    found.append(asyncio.run(notebook()))
    for expected, (hung, fine) in zip((3.0, 4.0), found, strict=True):
        assert hung.outcome == "timeout" and fine.reply["value"] == expected


def test_failed_rows_are_excluded_not_punished(pool: Pool) -> None:
    # Rows that are to be judged have one and a half seconds twice: they take microseconds.
    entries = [{**ACT, "limit_s": 3.0}, {"name": "hostilerewards:later", "weight": 0.5}]
    got = table(pool, entries, ["2", "sleep", "none", "raise"])
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
    # A shell's background jobs ignore SIGINT, and their children with them: Python then raises no KeyboardInterrupt.
    code = f"import sys, signal; sys.path.insert(0, {str(TESTS)!r}); import hostilerewards; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); hostilerewards.holder()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 3
        os.kill(parent.pid, number)
        parent.wait(30)
    until = time.monotonic() + 60
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
