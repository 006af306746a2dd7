"""A run that is cut off anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import shortrun

from unmask.rl import run
from unmask.rl.trainer import UnmaskTrainer

pytestmark = pytest.mark.usefixtures("place")


BASE = ["objective.inner_steps=3", "optim.steps=7", "run.save_every=1", "evaluation.every=3"]
KINDS = {
    "adapter": [],
    "all weights": ["model.lora=null", "optim.lr=1e-3", "optim.weight_decay=0.1"],
    "reference and recomputed old": ["objective.beta=0.05", "objective.old=recompute", "optim.schedule=linear"],
    "choices of positions, drawn steps": [
        "rollout.sampler.score=sampled_confidence",
        "objective.unit=step",
        "objective.estimator={name: trace, steps: uniform_k, k: 2}",
    ],
    "tokens taken back": [
        "rollout.sampler.remasking={name: doubt, level: 0.9}",
        "rollout.sampler.editing={name: token_to_token, level: 0.5, post_steps: 2}",
        "rollout.sampler.score=sampled_confidence",
        "objective.unit=step",
    ],
    "changing lengths": ["rollout.sampler.length={name: insertion, start: 4, by: 3, low: 0.9}"],
    "ratio of a rollout, frozen copy": [
        "model.lora=null",
        "optim.lr=1e-3",
        "objective.unit=rollout",
        "objective.beta=0.05",
    ],
    "drafts of steps, tokens taken back": [
        "method=mdpo",
        "objective.estimator={name: drafts, steps: top_k, k: 3}",
        "objective.beta=0.02",
        "rollout.sampler.remasking={name: doubt, level: 0.9}",
    ],
    "merged steps, divergence from the old policy": [
        "method=tracerl",
        "objective.estimator={name: trace, merge: 3}",
        "objective.beta=0.1",
    ],
    "a value model": [
        "method=tracerl_value",
        "objective.estimator.merge=3",
        "value={lr: 1e-2, updates: 2, decay: 0.9}",
    ],
    "a value head": [
        "model.lora=null",
        "optim.lr=1e-3",
        "method=tracerl_value",
        "objective.estimator.merge=1",
        "value={network: head, lr: 1e-2}",
    ],
    "muon": ["optim.optimizer=muon"],
    "a planner beside the adapter": shortrun.JOINT,
    "a planner beside all weights, muon, dual ascent": [
        *shortrun.JOINT,
        "model.lora=null",
        "optim.optimizer=muon",
        "planner.alpha=1.0",
        "planner.target_nfe=5.0",
    ],
    "canvases drawn anew for each inner step": [
        "method=coupled_grpo",
        "objective={inner_steps: 3, beta: 0.05, chunk: 7}",
    ],
}
OFTEN = ("adapter", "all weights", "drafts of steps, tokens taken back")


class PowerCut(RuntimeError):
    """Stands for whatever ends a process."""


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch, model: Path) -> Callable[..., Path]:
    """Run until the update after `step`, which raises in the middle of its gradient; return the run's folder."""

    def start(step: int, *overrides: str) -> Path:
        whole = UnmaskTrainer.training_step

        def training_step(self: UnmaskTrainer, module: object, inputs: dict, count: object = None) -> object:
            loss = whole(self, module, inputs, count)
            if inputs["step"] == step:
                raise PowerCut
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(UnmaskTrainer, "training_step", training_step)
            with pytest.raises(PowerCut):
                run.train(shortrun.recipe(model, "name=cut", *BASE, *overrides))
        return Path("runs/cut")

    return start


def straight(model: Path, *overrides: str) -> Path:
    run.train(shortrun.recipe(model, "name=straight", *BASE, *overrides))
    return Path("runs/straight")


def resume(model: Path, folder: Path, *overrides: str) -> Path:
    run.train(shortrun.recipe(model, "name=cut", *BASE, *overrides), resume=folder)
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def assert_same(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert shortrun.same_weights(one, other)
    files = [sorted(path.name for path in (folder / "rollouts").glob("*.parquet")) for folder in (one, other)]
    assert files[0] == files[1] and files[0]
    for name in files[0]:
        tables = [pyarrow.parquet.read_table(folder / "rollouts" / name) for folder in (one, other)]
        assert tables[0].equals(tables[1]), name
    results = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for stage in ("before", "after"):
        kept = [{k: v for k, v in r[stage].items() if k not in ("wall_s", "tokens_per_s")} for r in results]
        assert kept[0] == kept[1]
    # Every step has its clocks once.
    steps = [record["step"] for record in shortrun.lines(other / "timing.jsonl") if "time/step_s" in record]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("overrides", shortrun.parameters(KINDS, often=OFTEN))
def test_cut_off_between_inner_steps(model: Path, cut_off: Callable[..., Path], overrides: list[str]) -> None:
    # Two of the three inner steps of the second batch are done: their plan is in flight.
    folder = cut_off(5, *overrides)
    assert shortrun.checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]
    assert_same(straight(model, *overrides), resume(model, folder, *overrides))


@pytest.mark.parametrize(
    "overrides", [[], pytest.param(KINDS["all weights"], marks=pytest.mark.slow)], ids=["adapter", "all weights"]
)
def test_killed_at_any_moment(model: Path, overrides: list[str]) -> None:
    slow = [*overrides, "rewards=[{name: 'toyrewards:slow_mean_id'}]", "optim.steps=24", "evaluation.every=0"]
    rng = random.Random(str(overrides))
    recipe = shortrun.recipe(model, "name=killed", *BASE, *slow)
    process, folder, step = shortrun.start(recipe), Path("runs/killed"), rng.randrange(1, 9)
    while not any(int(name.split("-")[1]) >= step for name in shortrun.checkpoints(folder)):
        assert process.process.is_alive(), process.text()
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.05))
    process.kill()
    assert process.process.exitcode == -9 and not (folder / "summary.json").exists()
    shortrun.finish([shortrun.start(recipe, resume=folder)])
    assert_same(straight(model, *slow), folder)


@pytest.mark.slow
def test_killed_again_and_again(model: Path) -> None:
    slow = ["rewards=[{name: 'toyrewards:slow_mean_id'}]", "optim.steps=40", "run.keep=1"]
    recipe, folder = shortrun.recipe(model, "name=killed", *BASE, *slow), Path("runs/killed")
    rng, kills, resumed = random.Random(7), 0, None
    while not (folder / "summary.json").exists():
        assert kills < 100
        process = shortrun.start(recipe, resume=resumed)
        process.process.join(rng.uniform(0.2, 3.0) if kills < 12 else None)
        if process.process.is_alive():
            process.kill()
            kills += 1
        else:
            assert process.process.exitcode == 0, process.text()
        resumed = folder if shortrun.checkpoints(folder) else None
        # Before the first checkpoint there is nothing to resume: the folder is begun anew.
        if resumed is None and folder.exists():
            folder.rename(f"runs/dead-{kills}")
    assert kills >= 3
    assert_same(straight(model, *slow), folder)


def test_killed_while_a_checkpoint_was_written(model: Path, cut_off: Callable[..., Path]) -> None:
    folder = cut_off(5)
    newest = folder / "checkpoint-5"
    (newest / "unmask.json").unlink()
    for name in ("optimizer.pt", "plan-0.safetensors", "adapter_model.safetensors"):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: len(data) // 2])
    (newest / "trainer_state.json").unlink()
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 6, "lo')
    assert_same(straight(model), resume(model, folder))


def test_an_interrupted_checkpoint_is_not_resumed_from(model: Path, cut_off: Callable[..., Path]) -> None:
    folder = cut_off(5)
    (folder / "checkpoint-5" / "unmask.json").unlink()
    (folder / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="-5' was interrupted while it was written; complete ones: checkpoint-4"):
        resume(model, folder / "checkpoint-5")
    with pytest.raises(ValueError, match="checkpoint-8' does not exist"):
        resume(model, folder / "checkpoint-8")
    assert_same(straight(model), resume(model, folder))
    assert not (folder / "checkpoint-9").exists()


def test_resumed_from_an_older_checkpoint(model: Path, cut_off: Callable[..., Path]) -> None:
    folder = cut_off(5, "run.keep=5")
    assert_same(straight(model), resume(model, folder / "checkpoint-2", "run.keep=5"))
    assert shortrun.checkpoints(folder) == [f"checkpoint-{step}" for step in (3, 4, 5, 6, 7)]


def test_a_later_checkpoint_does_not_survive_its_rewriting(model: Path, cut_off: Callable[..., Path]) -> None:
    folder = cut_off(5, "run.keep=5")
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    # Going back to 2 and dying again must not leave the damaged 4 behind as the newest.
    with pytest.raises(PowerCut):
        cut_again(model, folder / "checkpoint-2", at=2)
    assert shortrun.checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]


def cut_again(model: Path, checkpoint: Path, *, at: int) -> None:
    def training_step(self: UnmaskTrainer, module: object, inputs: dict, count: object = None) -> object:
        assert inputs["step"] == at
        raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", training_step)
        resume(model, checkpoint, "run.keep=5")


def test_resuming_a_finished_run_changes_nothing(model: Path) -> None:
    folder = straight(model)
    metrics, trained = (folder / "metrics.jsonl").read_bytes(), shortrun.weights(folder)
    run.train(shortrun.recipe(model, "name=straight", *BASE), resume=folder)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert all((shortrun.weights(folder)[name] == value).all() for name, value in trained.items())


def test_a_finished_run_is_extended(model: Path) -> None:
    run.train(shortrun.recipe(model, "name=cut", *BASE, "optim.steps=4"))
    assert_same(straight(model), resume(model, Path("runs/cut")))


def test_a_run_goes_on_under_its_own_recipe_only(model: Path, cut_off: Callable[..., Path]) -> None:
    folder = cut_off(5)
    with pytest.raises(ValueError, match=r"optim.lr is 0.5 in the recipe, but 'runs/cut' runs with 0.01; leave it"):
        resume(model, folder, "optim.lr=0.5")
    with pytest.raises(ValueError, match=r"resume: rollout.group is 2 in the recipe"):
        resume(model, folder, "rollout.group=2")
    # What only decides speed and memory may change; the bits then may too.
    resume(model, folder, "rollout.micro_batch=3", "objective.chunk=5", "run.keep=1")
    assert (folder / "summary.json").is_file()
