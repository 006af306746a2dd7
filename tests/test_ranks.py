"""Two processes under gloo do what one does: the same rollouts, loss, gradient and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shortrun

from unmask.recipes.schema import Recipe
from unmask.rl import run

pytestmark = pytest.mark.usefixtures("place")


BASE = ["rollout.prompts=4", "optim.steps=8", "rewards=[{name: 'toyrewards:one_sided'}]", "evaluation.every=4"]
KINDS = {
    "adapter": ["rollout.micro_batch=3"],
    "drafts of steps": [
        "method=mdpo",
        "objective.estimator={name: drafts, steps: top_k, k: 3}",
        "objective.inner_steps=2",
        "objective.beta=0.02",
    ],
    "all weights, reference, ratio of a rollout": [
        "model.lora=null",
        "optim.lr=1e-3",
        "optim.weight_decay=0.1",
        "objective.unit=rollout",
        "objective.beta=0.05",
    ],
    "choices of positions, drawn steps, tokens alike": [
        "rollout.sampler.score=sampled_confidence",
        "objective.unit=step",
        "objective.estimator={name: trace, steps: uniform_k, k: 2}",
        "objective.weight=uniform",
    ],
    "a value model": [
        "method=tracerl_value",
        "objective={inner_steps: 2, estimator: {name: trace, merge: 2}}",
        "value={lr: 1e-2, updates: 2, decay: 0.8, discount: 0.9}",
    ],
    "a planner beside the adapter": shortrun.JOINT,
    "estimated views, bounds of a rollout, one scale for all groups": [
        "method=spg",
        "objective={inner_steps: 2, estimator: {name: blockwise, size: 4, draws: 2}, advantage: batch_std}",
    ],
}


@pytest.mark.parametrize("overrides", shortrun.parameters(KINDS, often=["adapter"]))
def test_two_ranks_do_what_one_does(model: Path, overrides: list[str]) -> None:
    recipe = shortrun.recipe(model, "name=two", *BASE, *overrides)
    processes = shortrun.start_ranks(recipe, 2)
    run.train(shortrun.recipe(model, "name=one", *BASE, *overrides))
    shortrun.finish(processes)
    one, two = Path("runs/one"), Path("runs/two")
    for step in (0, 2, 4, 6):
        shortrun.compare_rollouts(shortrun.rollouts(one, step), shortrun.rollouts(two, step))
    shortrun.compare_metrics(one, two)
    assert shortrun.distance(one, two) < 1e-6
    assert json.loads((two / "manifest.json").read_text())["ranks"] == 2
    # One rank alone speaks.
    assert "held-out exact" in processes[0].text() and not processes[1].text()


def test_prompts_that_two_ranks_cannot_share(model: Path) -> None:
    recipe = shortrun.recipe(model, "name=odd", *BASE, "rollout.prompts=3")
    processes = shortrun.start_ranks(recipe, 2)
    assert [process.wait() for process in processes] == [2, 2]
    line = processes[0].text().strip().splitlines()[-1]
    assert line.startswith("error: num_prompts: 3 prompts cannot be shared evenly by 2 processes")
    assert not Path("runs/odd").exists()


def killed_in_flight(model: Path, name: str) -> tuple[Recipe, Path]:
    """Return the recipe and the folder of a run of two ranks that was killed between the inner steps of a batch."""
    recipe = shortrun.recipe(model, f"name={name}", *BASE, "run.save_every=1", "run.keep=9", "objective.inner_steps=4")
    processes = shortrun.start_ranks(recipe, 2)
    processes[0].wait_for(Path("runs", name, "checkpoint-6", "unmask.json"))
    for process in processes:
        process.kill()
    return recipe, Path("runs", name)


def test_two_ranks_resume_to_the_same_bits(model: Path) -> None:
    recipe, folder = killed_in_flight(model, "killed")
    shortrun.finish(shortrun.start_ranks(recipe, 2, resume=folder / "checkpoint-6"))
    whole = recipe.model_copy(update={"name": "whole"})
    shortrun.finish(shortrun.start_ranks(whole, 2))
    assert shortrun.same_weights(folder, Path("runs/whole"))
    assert (folder / "metrics.jsonl").read_bytes() == Path("runs/whole/metrics.jsonl").read_bytes()
    check_other_number_of_ranks(recipe, folder)


def check_other_number_of_ranks(recipe: Recipe, folder: Path) -> None:
    """A batch whose inner steps are half done stays with its ranks; between batches their number may change."""
    copies = [folder.with_name(name) for name in ("half", "edge")]
    for copy, step in zip(copies, (6, 4), strict=True):
        subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
        for later in range(step + 1, 9):
            subprocess.run(["rm", "-rf", str(copy / f"checkpoint-{later}")], check=True)
    with pytest.raises(ValueError, match=r"2 process.es. share it; resume with --nproc 2, not 1"):
        run.train(recipe, resume=copies[0])
    run.train(recipe, resume=copies[1])
    assert shortrun.distance(folder, copies[1]) < 1e-6


@pytest.mark.slow
def test_the_command_starts_the_processes(model: Path) -> None:
    shortrun.recipe(model)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(shortrun.HERE), os.environ.get("PYTHONPATH", "")])}
    command = [str(Path(sys.executable).with_name("unmask")), "train", "short.yaml", *BASE, "--nproc", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out exact") == 1 and "Warning" not in done.stderr
    summary = json.loads(Path("runs/short/summary.json").read_text())
    assert summary["run"] == "short" and summary["n"] == 5
    # The same command again takes the next free folder, and a refusal is told without the launcher's own traceback.
    Path("short.yaml").write_text(Path("short.yaml").read_text().replace(str(model), "nowhere/at/all"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert "there is no folder 'nowhere/at/all'" in errors[0] and "the error above is the cause" in errors[-1]
    assert not Path("runs/short-2").exists()
