"""`unmask prefer` on the rollouts of a run: what it leaves, what it learns, and that a resumed run is the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
import yaml
from transformers import TrainingArguments

from unmask.policies.loading import load_denoiser
from unmask.recipes.loading import load_recipe
from unmask.recipes.preferences import load_preference
from unmask.recipes.registry import RecipeError
from unmask.rl import run
from unmask.rl.preference import Preference, pairs_of_run
from unmask.rl.preference_run import PreferenceTrainer, prefer

pytestmark = pytest.mark.usefixtures("place")

RECIPE = """
kind: preference
name: preferred
model: {path: MODEL, device: cpu, lora: {rank: 2}}
pairs: {run: runs/short, canvas: 16}
preference: {batch: 4, draws: 2}
optim: {lr: 2.0e-2, steps: 12}
run: {directory: runs}
"""


def written(model: Path, *overrides: str) -> Any:
    Path("preferred.yaml").write_text(RECIPE.replace("MODEL", str(model)))
    return load_preference("preferred.yaml", overrides)


def test_pairs_of_a_run_are_learnt(model: Path) -> None:
    run.train(shortrun.recipe(model, "optim.steps=4"))
    summary = prefer(written(model))
    folder = Path("runs/preferred")
    assert json.loads((folder / "summary.json").read_text()) == summary and summary["pairs"] == 4
    records = shortrun.lines(folder / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert records[0]["preference/margin"] == 0.0, "policy and reference are the same at first, on the same masks"
    assert records[-1]["preference/right"] >= 0.75 and records[-1]["loss"] < records[0]["loss"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "manifest.json").is_file()
    assert load_preference(folder / "recipe.yaml") == written(model)
    check_resumed(model, folder)


def check_resumed(model: Path, folder: Path) -> None:
    """A trainer of all weights that goes on from its second step ends with the bits of one that ran through."""
    pairs, ended = pairs_of_run(Path("runs/short")), []
    for resume in (None, "whole/checkpoint-2"):
        arguments = TrainingArguments(
            output_dir="whole" if resume is None else "again", max_steps=4, save_steps=2, use_cpu=True, report_to=[],
            seed=3, remove_unused_columns=False, dataloader_pin_memory=False, per_device_train_batch_size=1,
        )  # fmt: skip
        denoiser = load_denoiser(str(model))
        trainer = PreferenceTrainer(
            denoiser, pairs, Preference(draws=2), batch=2, canvas=16, args=arguments,
            optim={"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        ended.append(torch.cat([parameter.detach().flatten() for parameter in denoiser.model.parameters()]))
    assert torch.equal(*ended)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["pairs.run=null"], "exactly one of file and run; neither is there"),
        (["pairs.file=x.jsonl"], "exactly one of file and run; both are there"),
        (["preference.beta=0"], "preference.beta"),
        (["preference.betta=1"], "betta"),
        (["model.lora=null", "preference.reference=adapter_off"], "adapter_off needs model.lora"),
    ],
)
def test_recipes_that_are_refused(model: Path, overrides: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        written(model, *overrides)


def test_other_commands_say_which_one_it_is(model: Path) -> None:
    assert yaml.safe_load(RECIPE)["kind"] == "preference" and written(model)
    with pytest.raises(RecipeError, match="unmask prefer"):
        load_recipe("preferred.yaml")
