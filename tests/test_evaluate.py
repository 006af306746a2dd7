"""Held-out evaluation: its numbers by hand, what it may depend on, and what the commands open."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shortrun
import toyrewards

from unmask.policies.loading import load_denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards import build_rewards, score
from unmask.rl import run, show
from unmask.rl.evaluate import evaluate, heldout_rows
from unmask.rl.targets import open_target
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import RolloutBatch, RolloutWorker

pytestmark = pytest.mark.usefixtures("place")

ROWS = [{"prompt": "x" * (1 + index % 3), "index": index} for index in range(10)]


def worker(model: Path, reward: Any, **changes: Any) -> RolloutWorker:
    denoiser = load_denoiser(str(model))
    rewards = build_rewards([reward])
    section = {"schedule": {"name": "blocks", "size": 8, "per_step": 4}, "eos": {"rule": "none", "suppress": True}}
    made = RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=build_sampler(section),
        scorer=lambda *batch: score(rewards, *batch),
        group=3,
        canvas=16,
        prompt_limit=32,
        seed=0,
    )
    return replace(made, **changes)


def test_by_hand(model: Path) -> None:
    def reward(completions: list, index: list[int], log_extra: Any, **kwargs: Any) -> list[float | None]:
        codes = {0: "ok", 1: "wrong", 2: "unparsable"}
        log_extra("outcome", [codes[min(i % 4, 2)] for i in index])
        return [None if i == 9 else float(i) for i in index]

    batches: list[RolloutBatch] = []
    done: list[int] = []
    result = evaluate(worker(model, reward, micro_batch=4), ROWS, progress=done.append, keep=batches)
    # Rows 0, 4, 8 are right; 1, 5, 9 wrong; the rest unparsable. Row 9 has no reward and counts as 0.
    assert (result.n, result.exact) == (10, 0.3)
    assert result.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 10))
    assert result.outcomes == {"ok": 3, "wrong": 3, "unparsable": 4}
    assert result.reward == pytest.approx(sum(range(9)) / 10)
    # Sixteen positions, four a step, one completion a row whatever the worker's group.
    assert (result.nfe, result.length) == (4.0, 16.0)
    assert done == [4, 4, 2] and [len(batch) for batch in batches] == done
    assert result.tokens_per_s == pytest.approx(160 / result.wall_s)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_micro_batches_do_not_matter(model: Path, temperature: float) -> None:
    results, texts = [], []
    for size in (1, 3, 64):
        batches: list[RolloutBatch] = []
        base = worker(model, toyrewards.mean_id, micro_batch=size)
        result = evaluate(replace(base, sampler=replace(base.sampler, temperature=temperature)), ROWS, keep=batches)
        results.append((result.exact, result.reward, result.nfe, result.length, result.outcomes))
        texts.append([text for batch in batches for text in batch.completions])
    assert results[0] == results[1] == results[2]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > (1 if temperature else 0)


def test_noise_is_that_of_evaluation(model: Path) -> None:
    base = worker(model, toyrewards.mean_id)
    batches: list[RolloutBatch] = []
    evaluate(base, ROWS, keep=batches)
    evaluate(base, ROWS, keep=batches)
    assert batches[0].completions == batches[1].completions
    trained = replace(base, group=1).collect(ROWS, step=0)
    assert trained.completions != batches[0].completions, "no training batch may see the evaluation's noise"


def test_the_mode_of_the_model_is_given_back(model: Path) -> None:
    base = worker(model, toyrewards.mean_id)
    for training in (True, False):
        base.denoiser.model.train(training)
        evaluate(base, ROWS[:1])
        assert base.denoiser.model.training is training


def test_rows(model: Path) -> None:
    rows = SLOTS["task"].build("arithmetic")("heldout", seed=3)
    assert heldout_rows(rows, 4) == [rows.row(index) for index in range(4)]
    with pytest.raises(RecipeError, match="there are no held-out problems"):
        evaluate(worker(model, toyrewards.mean_id), [])


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that have ended, with an adapter and with all weights; the first has checkpoints of its way too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        overrides = ["evaluation.temperature=1.0", "run.save_every=2", "optim.lr=0.03"]
        adapter = shortrun.recipe(model, *overrides)
        whole = shortrun.recipe(model, *overrides, "name=whole", "model.lora=null", "optim.lr=3e-3")
        return {recipe.name: Path(run.train(recipe)["folder"]).absolute() for recipe in (adapter, whole)}


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("n", "exact", "stderr", "reward", "nfe", "length")}


@pytest.mark.parametrize("name", ["short", "whole"])
def test_a_run_evaluates_to_what_it_said(
    finished: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[name]
    summary = json.loads((folder / "summary.json").read_text())
    result = run.evaluate(str(folder))
    assert numbers(result) == numbers(summary["after"]) != numbers(summary["before"])
    assert f"next: unmask sample {folder}" in capsys.readouterr().out
    # The last checkpoint holds the same policy, the middle one another; the recipe alone names the untrained model.
    assert numbers(run.evaluate(str(folder / "checkpoint-4"))) == numbers(result)
    assert numbers(run.evaluate(str(folder / "checkpoint-2"))) != numbers(result)
    assert numbers(run.evaluate(str(folder / "recipe.yaml"))) == numbers(summary["before"])
    more = run.evaluate(str(folder), problems=7)
    assert more["n"] == 7 and more["manifest"]["ranks"] == 1 and more["target"] == str(folder)


def test_overrides_reach_the_evaluation(finished: dict[str, Path]) -> None:
    result = run.evaluate(str(finished["short"]), overrides=["evaluation.sampler.schedule.per_step=8"])
    assert result["nfe"] <= 2.0


def test_a_model_folder(finished: dict[str, Path], model: Path) -> None:
    recipe, denoiser = open_target(str(model), ["rollout.canvas=32"])
    assert recipe.model.path == str(model) and recipe.rollout.canvas == 32 and denoiser.base is denoiser.model
    result = run.evaluate(str(finished["whole"] / "model"), problems=2)
    assert result["n"] == 2 and result["manifest"]["model"].endswith("whole/model")


def test_sample_prints_every_step(finished: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    trajectory = show.sample(str(finished["short"]), overrides=["rollout.sampler.eos={rule: none, suppress: true}"])
    shown = capsys.readouterr().out
    steps = [line for line in shown.splitlines() if line[:4].strip().isdigit()]
    assert [int(line[:4]) for line in steps] == list(range(1, 9)) and int(trajectory.steps_B[0]) == 8
    # Two positions fewer are masked after every step, and the last line is the completion.
    assert [line.count("·") for line in steps] == [14, 12, 10, 8, 6, 4, 2, 0]
    assert "16 tokens in 8 steps (NFE), temperature 1" in shown and "outcome: " in shown
    assert f"next: unmask evaluate {finished['short']}" in shown


def test_sample_takes_a_prompt_and_any_seed(finished: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    trajectory = show.sample(str(finished["short"]), prompt="[bold]1 a+2")
    shown = capsys.readouterr().out
    assert "[bold]1 a+2" in shown and "outcome" not in shown
    assert len(trajectory) == 1
    # A seed is any number; the problem it picks is one of those that are evaluated.
    show.sample(str(finished["short"]), overrides=["run.seed=20261121"])
