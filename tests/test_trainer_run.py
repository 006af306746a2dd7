"""A short run from recipe to summary: what it writes, that its first ratios are 1, that it learns, what it saves."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pyarrow.parquet
import pytest
import shortrun
import torch

from unmask.policies.loading import load_denoiser
from unmask.recipes.loading import load_recipe
from unmask.recipes.schema import Recipe
from unmask.rl import run
from unmask.rl.checkpoints import MARKER

pytestmark = pytest.mark.usefixtures("place")


COLUMNS = {"step", "rollout_id", "group", "prompt", "completion", "tokens", "source", "born", "logprob", "nfe"}


def train(model: Path, *overrides: str) -> tuple[dict, Path]:
    recipe = shortrun.recipe(model, *overrides)
    summary = run.train(recipe)
    return summary, Path(summary["folder"])


def test_a_run_leaves_everything_there_is_to_read(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", FutureWarning)
        summary, folder = train(model, "run.save_every=2", "evaluation.every=2")
    assert not [str(w.message) for w in seen if issubclass(w.category, FutureWarning)]
    shown = capfd.readouterr()
    assert "Warning" not in shown.err and f"unmask sample {folder}" in shown.out
    # The recipe is the resolved one: it loads to itself and lacks no default.
    resolved = load_recipe(folder / "recipe.yaml")
    assert resolved == shortrun.recipe(model, "run.save_every=2", "evaluation.every=2")
    assert "micro_batch: 64" in (folder / "recipe.yaml").read_text()
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["n"] == 5 and summary["wall_s"] > 0 and summary["steps"] == 4
    for stage in ("before", "after"):
        assert 0.0 <= summary[stage]["exact"] <= 1.0 and summary[stage]["n"] == 5
    check_manifest(json.loads((folder / "manifest.json").read_text()))
    check_metrics(folder)
    check_rollouts(folder)
    assert shortrun.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    hidden = [path.name for path in folder.rglob(".*")]
    assert not hidden, "temporary files are left"


def check_manifest(manifest: dict) -> None:
    def empty(value: object) -> bool:
        if isinstance(value, dict):
            return not value or any(empty(inner) for inner in value.values())
        return value is None or value == ""

    assert not {key for key, value in manifest.items() if empty(value)}
    wanted = set(
        ["git_commit", "versions", "device", "device_name", "dtype", "seeds", "command", "python", "ranks", "model"]
    )
    assert wanted <= manifest.keys() and manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def check_metrics(folder: Path) -> None:
    records = shortrun.lines(folder / "metrics.jsonl")
    updates = [record for record in records if "loss" in record]
    assert [record["step"] for record in updates] == [1, 2, 3, 4]
    # Before, and twice inside: the one after the last step is the one after training.
    evaluations = [record for record in records if "eval/exact" in record]
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    # A batch is collected every other step, and only then there are rollouts to report.
    assert ["reward/total" in record for record in updates] == [True, False, True, False]
    first = updates[0]
    assert first["train/tokens"] > 0 and first["grad_norm"] > 0 and first["learning_rate"] == 0.01
    assert sum(first[f"outcome/{code}"] for code in ("ok", "wrong", "unparsable", "timeout", "error")) == 1.0
    assert first["reward/total"] == first["reward/mean_id"] and first["advantage/zero_share"] == 0.0
    assert not any(key.startswith("time/") for record in records for key in record), "clocks make no reproducible file"
    clocks = shortrun.lines(folder / "timing.jsonl")
    assert {"time/rollout_s", "time/update_s", "time/step_s"} <= set().union(*clocks)


def check_rollouts(folder: Path) -> None:
    files = sorted((folder / "rollouts").iterdir())
    assert [path.name for path in files] == ["step-000000.parquet", "step-000002.parquet"]
    table = pyarrow.parquet.read_table(files[0]).to_pylist()
    assert len(table) == 8 and COLUMNS | {"reward", "advantage", "outcome", "reward/mean_id"} <= table[0].keys()
    for row in table:
        # The step map: two tokens a step until the end, nothing where nothing was drawn.
        for step in range(row["nfe"]):
            assert 1 <= row["born"].count(step) <= 2
        assert [born == -1 for born in row["born"]] == [source == 0 for source in row["source"]]
        assert all((logprob < 0) == (born >= 0) for born, logprob in zip(row["born"], row["logprob"], strict=True))
        length = row["tokens"].index(256) + 1 if 256 in row["tokens"] else 16
        assert row["reward"] == pytest.approx(sum(row["tokens"][:length]) / (261 * length))
    assert sum(row["advantage"] for row in table) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("unit", ["token", "step", "rollout"])
@pytest.mark.parametrize(
    "choice", ["selection=top", "selection={name: threshold, level: 0.05}", "score=sampled_confidence"]
)
def test_the_first_inner_step_has_ratio_one(model: Path, choice: str, unit: str) -> None:
    # Chunks and micro-batches that share no shape, temperatures that differ: only canvas and tokens are the same.
    _, folder = train(
        model,
        f"rollout.sampler.{choice}",
        f"objective.unit={unit}",
        "rollout.temperature=0.8",
        "rollout.sampler.score_temperature=1.3",
        "rollout.micro_batch=3",
        "objective.chunk=5",
        "evaluation.problems=1",
    )
    updates = [record for record in shortrun.lines(folder / "metrics.jsonl") if "loss" in record]
    fresh, stale = updates[0::2], updates[1::2]
    assert all(record["train/tokens"] > 0 for record in updates)
    assert max(record["train/ratio_max_deviation"] for record in fresh) <= 1e-5
    assert min(record["train/ratio_max_deviation"] for record in stale) > 1e-4, "the second inner step must have moved"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reward_rises(model: Path, seed: int) -> None:
    _, folder = train(
        model,
        "model.lora=null",
        "rewards=[{name: 'toyrewards:low'}]",
        f"run.seed={seed}",
        "rollout={prompts: 4, group: 8, canvas: 8, sampler: {schedule: {name: blocks, size: 8, per_step: 2}}}",
        "objective.inner_steps=1",
        "optim={lr: 0.01, steps: 20}",
        "evaluation.problems=1",
    )
    rewards = [r["reward/total"] for r in shortrun.lines(folder / "metrics.jsonl") if "reward/total" in r]
    # From chance (a half) to 0.97 with each of these seeds.
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.85, rewards


def test_full_fine_tuning_is_saved_in_the_vendors_layout(model: Path) -> None:
    _, folder = train(model, "model.lora=null", "optim.lr=1e-3")
    trained, start = load_denoiser(str(folder / "model")), load_denoiser(str(model))
    moved = [
        name
        for (name, a), b in zip(trained.model.named_parameters(), start.model.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert len(moved) == len(list(start.model.parameters())), "every weight learns"


def test_what_is_counted_over_the_rollouts_a_reward_applies_to(model: Path) -> None:
    rewards = "rewards=[{name: 'toyrewards:counted'}, {name: 'toyrewards:mean_id', weight: 0}]"
    _, folder = train(model, rewards, "optim.steps=1")
    (record,) = (record for record in shortrun.lines(folder / "metrics.jsonl") if "loss" in record)
    assert record["reward/counted"] == 1.0 and 0 < record["reward/mean_id"] < 1
    assert record["custom/seen"] == 8.0
    table = pyarrow.parquet.read_table(folder / "rollouts" / "step-000000.parquet").to_pylist()
    assert [row["reward/counted"] for row in table] == [1.0, None] * 4
    assert [row["extra/size"] for row in table] == [str(len(row["completion"])) for row in table]


def test_a_second_run_never_writes_into_the_first(model: Path) -> None:
    _, first = train(model, "optim.steps=1")
    _, second = train(model, "optim.steps=1")
    assert (first.name, second.name) == ("short", "short-2")
    assert first.joinpath("metrics.jsonl").read_bytes() == second.joinpath("metrics.jsonl").read_bytes()


def test_another_seed_is_another_run(model: Path) -> None:
    _, first = train(model, "optim.steps=1")
    _, second = train(model, "optim.steps=1", "run.seed=1")
    assert not shortrun.same_weights(first, second)


def test_keep_bounds_the_checkpoints_on_disk(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: object, *args: object, **kwargs: object) -> None:
        seen.append(shortrun.checkpoints(Path("runs/short")))
        remove(path, *args, **kwargs)

    monkeypatch.setattr("unmask.rl.checkpoints.shutil.rmtree", watched)
    _, folder = train(model, "run.save_every=1", "run.keep=1")
    assert shortrun.checkpoints(folder) == ["checkpoint-4"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    # Whenever one is removed, a newer one is complete already.
    assert ["checkpoint-2"] in seen and all(seen[1:-1])


def test_the_adapted_modules_are_named(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="unmask"):
        train(model, "optim.steps=1")
    assert "LoRA rank 2 on 14 modules (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in caplog.text


def test_the_quickstart_recipe_runs(model: Path) -> None:
    recipe = load_recipe(
        "quickstart.yaml",
        [f"model.path={model}", "optim.steps=2", "optim.warmup=0", "rollout.prompts=2", "evaluation.problems=4"],
    )
    assert isinstance(recipe, Recipe)
    summary = run.train(recipe)
    assert summary["n"] == 4 and not list(Path(summary["folder"]).rglob(MARKER))


def test_a_start_that_fails_leaves_no_folder(model: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        train(Path("nowhere"))
    assert not Path("runs/short").exists()
