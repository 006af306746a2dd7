"""`unmask prefer` on the rollouts of a run: what it leaves, what it learns, and that a resumed run is the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from transformers import TrainingArguments

from unmask.policies.loading import load_denoiser
from unmask.recipes.loading import load_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import run
from unmask.rl.preference import Preference, pairs_of_run
from unmask.rl.preference_run import PreferenceTrainer, prefer
from unmask.rl.report import report

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
    return load_recipe("preferred.yaml", overrides)


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
    assert load_recipe(folder / "recipe.yaml") == written(model)
    assert "Gradient norm" in report(folder).read_text()
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
        (["optim.warmup=12"], "optim.warmup"),
        (["model.lora=null", "preference.reference=adapter_off"], "adapter_off needs model.lora"),
    ],
)
def test_recipes_that_are_refused(model: Path, overrides: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        written(model, *overrides)


@pytest.mark.parametrize("asked", [["train"], ["sft"], ["data", "check"], ["reward", "check"], ["evaluate"]])
def test_other_commands_say_what_kind_it_is(asked: list[str], model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(model)
    assert shortrun.command(*asked, "preferred.yaml") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    told = {"train": "run `unmask prefer preferred.yaml`", "sft": "run `unmask prefer preferred.yaml`"}
    told |= {"data": "has pairs and no tasks", "reward": "of kind preference", "evaluate": "of kind preference"}
    assert told[asked[0]] in line
    shortrun.recipe(model)
    assert shortrun.command("prefer", "short.yaml") == 2
    assert "of kind rl; run `unmask train short.yaml`" in capfd.readouterr().err


def test_check_says_what_it_will_do(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(model)
    lines = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = ["pairs={file: pairs.jsonl, canvas: 16}", "preference.draws=3", "run.save_every=50"]
    assert shortrun.command("check", "preferred.yaml", *changes, "--json", "facts.json") == 0
    facts, text = json.loads(Path("facts.json").read_text()), capsys.readouterr().out
    # 4 pairs, 2 completions of 3 canvases: one pass of the reference, two of the policy.
    assert facts["forwards_an_update"] == 3 * 4 * 2 * 3 and facts["updates"] == 12
    assert facts["data"] == "6 pairs, seen 8.0 times each"
    assert "note: run.save_every 50" in text and "ok; next: unmask prefer preferred.yaml" in text
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "1", "chosen": "a"}))
    assert shortrun.command("check", "preferred.yaml", *changes) == 2
    assert shortrun.command("check", "preferred.yaml") == 0
    assert "there is no 'runs/short' yet" in capsys.readouterr().out
    assert shortrun.command("check", "preferred.yaml", "--nproc", "3") == 2
    assert shortrun.command("prefer", "preferred.yaml", "pairs={file: none.jsonl, canvas: 16}") == 2
