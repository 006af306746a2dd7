"""`unmask sft` from a recipe to a folder that loads: summary, manifest, held-out results, and a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.policies.loading import load_denoiser
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import sft_run
from unmask.rl.sft import SftTrainer
from unmask.rl.sft_run import build_model, evaluate_tasks, label, sft, sources

RECIPE = """
kind: sft
name: small
model: {init: {hidden_size: 32, layers: 1, heads: 2, mlp: 64}, device: cpu}
tasks:
  - {task: {name: arithmetic, level: easy}, canvas: 64, weight: 2.0}
  - {task: {name: sudoku, clues: [10, 12]}, canvas: 80}
sft: {batch: 4}
optim: {lr: 1.0e-3, steps: 4}
evaluation: {problems: 2, sampler: {schedule: {name: blocks, size: 16, per_step: 16}}}
"""


def recipe(folder: Path, *overrides: str) -> Any:
    return parse_recipe(RECIPE, [f"run.directory={folder}", *overrides])


def test_a_run_leaves_a_model_that_loads_and_its_numbers(tmp_path: Path) -> None:
    summary = sft(recipe(tmp_path))
    folder = tmp_path / "small"
    assert summary == json.loads((folder / "summary.json").read_text())
    # Embedding and head 2 x 261 x 32, attention 4 x 32^2, MLP 3 x 32 x 64, three norms.
    assert summary["parameters"] == 2 * 261 * 32 + 4 * 32**2 + 3 * 32 * 64 + 3 * 32
    assert set(summary["heldout"]) == {"arithmetic/easy", "sudoku"}
    for name, nfe in (("arithmetic/easy", 4), ("sudoku", 5)):
        result = summary["heldout"][name]
        assert result["n"] == 2
        assert result["nfe"] <= nfe
        assert sum(result["outcomes"].values()) == 2
    manifest = json.loads((folder / "model" / "manifest.json").read_text())
    assert manifest["heldout"] == summary["heldout"]
    assert manifest["seeds"] == {"run": 0}
    assert manifest["device"] == "cpu"
    assert parse_recipe((folder / "recipe.yaml").read_text()) == recipe(tmp_path)
    loaded = load_denoiser(str(folder / "model"))
    fresh = build_model(recipe(tmp_path))
    assert loaded.family == fresh.family
    moved = [not torch.equal(a, b) for a, b in zip(loaded.model.parameters(), fresh.model.parameters(), strict=True)]
    assert all(moved)


def test_tasks_of_one_name_keep_their_own_results(tmp_path: Path) -> None:
    section = recipe(tmp_path, "tasks.1.task={name: arithmetic, level: easy, largest: 4}")
    results = evaluate_tasks(section, build_model(section), 1)
    assert list(results) == ["arithmetic/easy", "arithmetic/easy-1"]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint at step 2 of 4, taken up again: two steps more, and the same bytes."""
    steps: list[int] = []
    original = SftTrainer.training_step
    monkeypatch.setattr(SftTrainer, "training_step", lambda self, *a: steps.append(1) or original(self, *a))
    sft(recipe(tmp_path, "run.save_every=2"))
    model = tmp_path / "small" / "model"
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    assert len(steps) == 4
    sft(recipe(tmp_path, "run.save_every=2"), resume=tmp_path / "small" / "checkpoints" / "checkpoint-2")
    assert len(steps) == 6
    assert (model / "model.safetensors").read_bytes() == whole


def test_a_saved_model_can_be_trained_on(tmp_path: Path) -> None:
    denoiser = build_model(recipe(tmp_path, "run.seed=3"))
    denoiser.save(tmp_path / "start")
    section = recipe(tmp_path, "model.init=null", f"model.path={tmp_path / 'start'}", "model.dtype=bfloat16")
    loaded = build_model(section)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.lm_head.weight, denoiser.model.lm_head.weight.bfloat16())
    assert not torch.equal(denoiser.model.lm_head.weight, build_model(recipe(tmp_path)).model.lm_head.weight)


def test_sources_and_their_names(tmp_path: Path) -> None:
    first, second = sources(recipe(tmp_path))
    assert (first.name, first.weight, first.canvas) == ("arithmetic", 2.0, 64)
    assert (second.name, second.weight, second.canvas) == ("sudoku", 1.0, 80)
    assert "prompt" in first.rows.row(0)
    assert "reference" in second.rows.row(0)
    assert label({"name": "arithmetic", "level": "hard"}) == "arithmetic/hard"
    assert label({"name": "arithmetic", "level": "mixed", "operations": [1, 2]}) == "arithmetic/1-2"
    assert label({"name": "sudoku", "clues": [4, 8]}) == "sudoku"


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_run, "world_size", lambda: 3)
    with pytest.raises(RecipeError, match=r"sft.batch: 4 does not divide among 3 ranks"):
        sft(recipe(tmp_path))
    assert not (tmp_path / "small").exists()
