"""Scorer: a limit on failures that stops the run with the cause, chunks that overlap with rollouts, and metrics."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from unmask.policies.loading import new_denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards import Reward, RewardError, Scorer, ScoringConfig, build_rewards
from unmask.rewards.scorer import LEAST, WINDOW
from unmask.rl import cli, run
from unmask.rl.evaluate import evaluate
from unmask.rl.records import batch_metrics, merge_metrics
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import RolloutWorker

sys.path.append(str(Path(__file__).parent))
import shortrun

TESTS = str(Path(__file__).parent)


def reporting(codes: list[str | None], causes: list[str | None] | None = None) -> Reward:
    """Return a reward that reports these outcomes in turn."""

    def judge(completions: list[str], log_extra: Any, **_: Any) -> list[float | None]:
        log_extra("outcome", codes[: len(completions)])
        log_extra("cause", (causes or [None] * len(codes))[: len(completions)])
        return [1.0 if code == "ok" else None if code in ("timeout", "error") else 0.0 for code in codes]

    return Reward("judge", judge)


def scored(scorer: Scorer, count: int) -> Any:
    return scorer([{"prompt": "p"}] * count, ["p"] * count, ["x"] * count, [[1]] * count)


def test_a_rate_over_its_limit_stops_with_the_cause() -> None:
    codes = ["ok"] * 90 + ["timeout"] * 4 + ["error"] * 6
    causes = [None] * 90 + ["no verdict within 2 s"] * 4 + ["died of SIGKILL"] * 2 + ["MemoryError: "] * 4
    scorer = Scorer([reporting(codes, causes)], ScoringConfig(limits={"timeout": 0.04, "error": 0.05}))
    with pytest.raises(RewardError) as error:
        scored(scorer, 100)
    message = str(error.value)
    assert "reward 'judge': 6.0% of its last 100 verdicts are 'error', scoring.limits.error is 5.0%" in message
    assert "most often: MemoryError" in message and "\n" not in message
    scored(Scorer([reporting(codes)], ScoringConfig(limits={"timeout": 0.04, "error": 0.06})), 100)
    with pytest.raises(RewardError, match=r"90.0% of its last 100 verdicts are 'ok'.*it gave no cause"):
        scored(Scorer([reporting(codes)], ScoringConfig(limits={"ok": 0.5})), 100)


def test_the_rate_is_taken_over_a_window_and_never_over_a_handful() -> None:
    scorer = Scorer([reporting(["error"] * (LEAST - 1))])
    scored(scorer, LEAST - 1)
    with pytest.raises(RewardError, match=f"100.0% of its last {LEAST} verdicts"):
        scored(Scorer([reporting(["error"] * LEAST)]), LEAST)
    early = Scorer([reporting(["error"] * 50)])
    scored(early, 50)
    early.rewards = [reporting(["ok"] * WINDOW)]
    scored(early, WINDOW)  # what lies behind the window is forgotten
    early.rewards = [reporting(["error"] * 50)]
    scored(early, 50)  # 50 of 1024
    with pytest.raises(RewardError, match=f"of its last {WINDOW} verdicts"):
        scored(early, 50)


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"timeot": 0.1}, "'timeot' is no outcome code. Did you mean 'timeout'?"), ({"error": 1.5}, "must lie in")],
)
def test_limits_are_checked(limits: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        ScoringConfig(limits=limits)
    assert message in str(error.value)


def worker_with(rewards: list[Reward], denoiser: Any, micro_batch: int) -> RolloutWorker:
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 2}})
    options = {"group": 2, "canvas": 4, "prompt_limit": 64, "seed": 0, "micro_batch": micro_batch}
    return RolloutWorker(denoiser, denoiser.tokenizer, sampler, Scorer(rewards), **options)


def test_asynchronous_rewards_run_while_the_next_chunk_is_denoised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk's reward ends only when the second chunk is being denoised.

    Were it waited for before, it would wait for ever; its patience is there to end the test in that case.
    """
    denoiser = new_denoiser(hidden_size=16, layers=1, heads=2, mlp=16)
    second, chunks, sizes = threading.Event(), [], []

    async def slow(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        sizes.append(len(completions))
        chunk = len(sizes)
        if chunk == 1:
            assert await asyncio.to_thread(second.wait, 60)
        log_extra("place", [f"{chunk}/{i}" for i in range(len(completions))])
        return [float(chunk)] * len(completions)

    def counted(*arguments: Any, **options: Any) -> Any:
        chunks.append(None)
        if len(chunks) == 2:
            second.set()
        return denoise(*arguments, **options)

    monkeypatch.setattr("unmask.rollouts.worker.denoise", counted)
    batch = worker_with([Reward("slow", slow)], denoiser, 2).collect([{"prompt": "a"}, {"prompt": "b"}], step=0)
    assert sizes == [2, 2] and len(chunks) == 2
    assert batch.rewards.value_BR[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert batch.rewards.extra["place"] == ["1/0", "1/1", "2/0", "2/1"]


def test_chunks_change_no_reward() -> None:
    rows = [SLOTS["task"].build("countdown")("train", seed=0).row(i) for i in range(3)]
    rows[2] = {"prompt": rows[2]["prompt"], "numbers": None, "target": None, "answer": "5"}
    entries = ["countdown", "arithmetic", {"name": "answer_format", "isolated": True}]
    denoiser = new_denoiser(hidden_size=16, layers=1, heads=2, mlp=16)
    tables = [worker_with(build_rewards(entries), denoiser, m).collect(rows, step=0).rewards for m in (1, 64)]
    assert torch.equal(tables[0].value_BR.nan_to_num(9.0), tables[1].value_BR.nan_to_num(9.0))
    assert tables[0].outcome == tables[1].outcome and tables[0].extra == tables[1].extra
    assert len(tables[0]) == 6


def test_a_column_that_is_missing_is_found_although_chunks_begin_early() -> None:
    async def needs(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(completions)

    scorer = Scorer([Reward("needs", needs)])
    with pytest.raises(RewardError, match="reward 'needs' needs the column 'solution'"):
        scored(scorer, 2)
    scoring = scorer.begin()
    scoring.add([{"prompt": "a"}], ["a"], ["x"], [[1]])
    scoring.add([{"prompt": "b", "solution": "s"}], ["b"], ["y"], [[1]])
    assert scorer.finish(scoring).value_BR.tolist() == [[0.0], [0.0]]


def test_what_a_reward_needs_of_the_machine_is_asked_for_at_once() -> None:
    def judge(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    def ready() -> None:
        raise RewardError("reward 'judge': there is no sandbox; install it.")

    judge.ready = ready  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="there is no sandbox"):
        Scorer([Reward("judge", judge)])


def test_metrics_have_a_curve_for_every_component_code_and_truth(tmp_path: Path) -> None:
    denoiser = new_denoiser(hidden_size=16, layers=1, heads=2, mlp=16)
    truth = Reward("holds", lambda completions: [0.25] * len(completions), weight=0.0, truth=True)
    rewards = [reporting(["ok", "wrong", "timeout", "unparsable"]), truth]
    worker = worker_with(rewards, denoiser, 64)
    batch = worker.collect([{"prompt": "a"}, {"prompt": "b"}], step=0)
    metrics = merge_metrics([batch_metrics(batch)])
    assert metrics["truth/holds"] == 0.25 and "reward/holds" not in metrics
    assert metrics["reward/judge"] == pytest.approx(1 / 3) and metrics["reward/total"] == pytest.approx(1 / 3)
    shares = {code: metrics[f"outcome/judge/{code}"] for code in ("ok", "wrong", "unparsable", "timeout", "error")}
    assert shares == {"ok": 0.25, "wrong": 0.25, "unparsable": 0.25, "timeout": 0.25, "error": 0.0}
    single = worker_with([reporting(["ok"]), truth], denoiser, 1)
    result = evaluate(single, [{"prompt": "a"}, {"prompt": "b"}])
    assert result.components == {"reward/judge": 1.0, "truth/holds": 0.25}


def test_a_run_stops_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    model = shortrun.save_model(tmp_path / "model")
    rewards = "rewards=[{name: 'hostilerewards:sometimes', isolated: true, limit_s: 20}]"
    loaded = shortrun.recipe(model, rewards, "rollout.prompts=16", "scoring.limits.error=0.02")
    assert loaded.scoring.limits.error == 0.02
    with pytest.raises(RewardError, match=r"'sometimes': .*verdicts are 'error'.*an even number of characters"):
        run.train(loaded)
    monkeypatch.setattr(sys, "argv", ["unmask", "train", "short.yaml", rewards, "rollout.prompts=16"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: reward 'sometimes'")


def test_excluded_rows_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failing rows have no advantage; the run goes on, and its metrics say how many there were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    model = shortrun.save_model(tmp_path / "model")
    rewards = "rewards=[{name: 'hostilerewards:sometimes', isolated: true}, {name: answer_format, truth: true}]"
    loaded = shortrun.recipe(model, rewards, "scoring.limits.error=1", "optim.steps=1", "rollout.prompts=8")
    loaded.evaluation.temperature = 1.0
    summary = run.train(loaded)
    records = shortrun.lines(Path(summary["folder"]) / "metrics.jsonl")
    (step,) = [record for record in records if "loss" in record]
    assert 0 < step["outcome/sometimes/error"] < 1 and step["truth/answer_format"] == 0.0
    assert step["outcome/sometimes/error"] == step["outcome/error"]
    assert "eval/truth/answer_format" in records[0] and "eval/reward/sometimes" in records[0]
    (stored,) = Path(summary["folder"]).glob("rollouts/*.parquet")
    rows = pyarrow.parquet.read_table(stored).to_pylist()
    failed = [row for row in rows if row["outcome"] == "error"]
    assert failed and all(row["reward"] is None and "even number" in row["extra/cause"] for row in failed)
    assert all(row["advantage"] is None or row["advantage"] != row["advantage"] for row in failed)
