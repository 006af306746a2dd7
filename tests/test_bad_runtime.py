"""What goes wrong only while a run runs: one line with value, rule and remedy, and nothing half-written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unmask.rewards import RewardError
from unmask.rl import checkpoints, run
from unmask.rl.checkpoints import CheckpointReadError, CheckpointWriteError
from unmask.rl.losses import NonFiniteError
from unmask.rl.trainer import UnmaskTrainer

pytestmark = pytest.mark.usefixtures("place")


def one_line(error: BaseException, *fragments: str) -> None:
    text = str(error)
    assert "\n" not in text and all(fragment in text for fragment in fragments), text


def loads(folder: Path) -> None:
    """Assert that every complete checkpoint of a run can be read and is finite."""
    for path in checkpoints.complete_checkpoints(folder):
        for value in load_file(path / "adapter_model.safetensors").values():
            assert bool(value.isfinite().all())
        json.loads((path / "trainer_state.json").read_text())
        with (path / "optimizer.pt").open("rb") as file:
            torch.load(file, weights_only=True)
        assert checkpoints.load_plan(path / "plan-0.safetensors", None) is not None


# (name, overrides, error, what the line must say)
Case = tuple[str, list[str], type[ValueError], list[str]]
AT_START: list[Case] = [
    (
        "prompt longer than the limit",
        ["rollout.prompt_limit=5"],
        ValueError,
        ["its prompt has", "tokens, rollout.prompt_limit is 5", "raise the limit"],
    ),
    (
        "column of a reward",
        ["rewards=[{name: 'toyrewards:needs_solution'}]"],
        RewardError,
        ["reward 'needs_solution' needs the column 'solution'", "add it, or drop the reward"],
    ),
    ("reward of NaN", ["rewards=[{name: 'toyrewards:nan'}]"], RewardError, ["returned nan", "finite number, or None"]),
    (
        "reward of the wrong length",
        ["rewards=[{name: 'toyrewards:short'}]"],
        RewardError,
        ["returned 4 values for 5 completions", "exactly one a completion"],
    ),
    (
        "reward with a bug",
        ["rewards=[{name: 'toyrewards:broken'}]"],
        RewardError,
        ["'broken' raised ZeroDivisionError: division by zero", "correct it"],
    ),
    ("no model", ["model.path=./nowhere"], ValueError, ["there is no folder './nowhere'"]),
    (
        "LoRA target",
        ["model.lora.targets=[q_prj]"],
        ValueError,
        ["'q_prj' matches no linear layer", "Did you mean 'q_proj'?"],
    ),
    ("LM head as target", ["model.lora.targets=[lm_head]"], ValueError, ["'lm_head' cannot be adapted"]),
    ("empty dataset", ["task={name: jsonl, path: empty.jsonl}"], ValueError, ["empty.jsonl: the dataset is empty"]),
    (
        "more ranks than prompts are divisible by",
        ["--nproc", "3"],
        ValueError,
        ["rollout.prompts: 2", "cannot be shared evenly by 3 processes", "a multiple of 3"],
    ),
]


@pytest.mark.parametrize(("overrides", "error", "fragments"), [c[1:] for c in AT_START], ids=[c[0] for c in AT_START])
def test_at_the_start(
    model: Path,
    overrides: list[str],
    error: type[ValueError],
    fragments: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("empty.jsonl").write_text("")
    shortrun.recipe(model)
    assert shortrun.command("train", "short.yaml", *overrides) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(fragment in line for fragment in fragments), line
    # What is left, if anything, is the record of what was tried: no weights, no summary.
    assert not list(Path().rglob("adapter*")) and not list(Path().rglob("summary.json"))
    if overrides[0] != "--nproc":
        with pytest.raises(error) as caught:
            run.train(shortrun.recipe(model, *overrides))
        one_line(caught.value)


def test_a_model_with_nan_weights_is_not_started(model: Path, tmp_path: Path) -> None:
    damaged = shortrun.save_model(tmp_path / "damaged")
    state = load_file(damaged / "model.safetensors")
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    shortrun.recipe(damaged)
    assert shortrun.command("train", "short.yaml") == 2
    assert not Path("runs/short").exists()


def test_a_step_too_large_ends_in_one_line(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The first steps blow the weights up; the rollouts that follow have no finite log-probability.
    shortrun.recipe(model)
    assert shortrun.command("train", "short.yaml", "optim.lr=1e30", "run.save_every=1", "objective.inner_steps=1") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: rollout 0") and "are NaN, infinite" in error and "resume from" in error
    loads(Path("runs/short"))
    assert not Path("runs/short/adapter").exists() and not Path("runs/short/summary.json").exists()


@pytest.mark.parametrize(("at", "what"), [(2, "rollout 0, step 0: the logits"), (3, "a log-probability is nan")])
def test_weights_that_turn_nan(model: Path, monkeypatch: pytest.MonkeyPatch, at: int, what: str) -> None:
    # Before a batch is collected, and between its two inner steps.
    with monkeypatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", shortrun.poisoned(at))
        with pytest.raises(ValueError, match=what) as caught:
            run.train(shortrun.recipe(model, "run.save_every=1", "run.keep=5", "optim.steps=6"))
    one_line(caught.value, "rollout 0", "resume from", "checkpoint")
    folder = Path("runs/short")
    assert shortrun.checkpoints(folder) == [f"checkpoint-{step}" for step in range(1, at + 1)]
    loads(folder)
    # With the cause gone the run goes on from there.
    run.train(shortrun.recipe(model, "run.save_every=1", "run.keep=5", "optim.steps=6"), resume=folder)
    assert (folder / "summary.json").is_file()


def full(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the third checkpoint meet a full disk, at one of the files it consists of."""
    calls = {"count": 0}

    def failing(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            calls["count"] += 1
            if calls["count"] == 3:
                raise error
            return function(*args, **kwargs)

        return write

    full_disk = OSError(errno.ENOSPC, "No space left on device")
    if where == "plan":
        error: Exception = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(checkpoints, "save_file", failing(checkpoints.save_file, error))
    elif where == "marker":
        monkeypatch.setattr(checkpoints, "write_json", failing(checkpoints.write_json, full_disk))
    else:
        from transformers.trainer_callback import TrainerState

        monkeypatch.setattr(TrainerState, "save_to_json", failing(TrainerState.save_to_json, full_disk))


@pytest.mark.parametrize("where", ["plan", "marker", "state"])
def test_a_full_disk(model: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    recipe = shortrun.recipe(model, "run.save_every=1", "optim.steps=5")
    with monkeypatch.context() as patch:
        full(where, patch)
        with pytest.raises(CheckpointWriteError) as caught:
            run.train(recipe)
    folder = Path("runs/short")
    one_line(caught.value, "could not write", "No space left on device", "free some space", "--resume runs/short")
    # The one that was begun is gone and makes room; the two before it are whole.
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
    loads(folder)
    run.train(recipe, resume=folder)
    assert (folder / "summary.json").is_file()


def test_a_file_that_cannot_grow(model: Path) -> None:
    # The real thing: the kernel refuses to write a file beyond a limit, in the middle of torch's own writer.
    recipe = shortrun.recipe(model, "run.save_every=1", "optim.steps=3", "model.lora.rank=8")
    whole = shortrun.start(recipe.model_copy(update={"name": "whole"}))
    shortrun.finish([whole])
    sizes = {path.name: path.stat().st_size for path in Path("runs/whole/checkpoint-3").iterdir()}
    assert sizes["optimizer.pt"] > sizes["adapter_model.safetensors"] + 4096
    limit = sizes["adapter_model.safetensors"] + 2048
    process = shortrun.start(recipe, largest_file=limit)
    assert process.wait() == 2
    line = process.text().splitlines()[-1]
    assert line.startswith("error: runs/short: could not write (") and "free some space" in line, process.text()
    assert not list(Path("runs/short").glob("checkpoint-*")) and not Path("runs/short/adapter").exists()


def test_an_error_of_another_kind_keeps_its_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "the tracker is down")

    monkeypatch.setattr(UnmaskTrainer, "training_step", training_step)
    with pytest.raises(ConnectionRefusedError):
        run.train(shortrun.recipe(model))


@pytest.fixture
def stopped(model: Path) -> Path:
    """The folder of a run that died between the inner steps of its second batch; it has checkpoints 1 to 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", shortrun.poisoned(3))
        with pytest.raises(NonFiniteError):
            run.train(shortrun.recipe(model, "run.save_every=1", "run.keep=5", "optim.steps=6"))
    return Path("runs/short")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "foreign": b"\x00rubbish" * 40}[how])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("plan-0.safetensors", "cut"),
        ("plan-0.safetensors", "foreign"),
        ("plan-0.safetensors", "missing"),
        ("adapter_model.safetensors", "cut"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "empty"),
        ("optimizer.pt", "foreign"),
        ("trainer_state.json", "cut"),
        ("unmask.json", "foreign"),
    ],
)
def test_a_damaged_checkpoint(stopped: Path, model: Path, name: str, how: str) -> None:
    damage(stopped / "checkpoint-3" / name, how)
    recipe = shortrun.recipe(model, "run.save_every=1", "run.keep=5", "optim.steps=6")
    metrics = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointReadError) as caught:
        run.train(recipe, resume=stopped)
    one_line(caught.value, "checkpoint-3", "resume from")
    assert (stopped / "metrics.jsonl").read_bytes() == metrics, "nothing is cut before the checkpoint is read"
    # The remedy that it names works.
    run.train(recipe, resume=stopped / "checkpoint-2")
    assert (stopped / "summary.json").is_file()


def test_a_plan_with_foreign_tensors(stopped: Path, model: Path) -> None:
    path = stopped / "checkpoint-3" / "plan-0.safetensors"
    save_file({"plan.mass": torch.zeros(1)}, path, metadata={"constants": "{}"})
    with pytest.raises(CheckpointReadError, match=r"plan-0.safetensors: damaged"):
        run.train(shortrun.recipe(model, "run.save_every=1", "run.keep=5", "optim.steps=6"), resume=stopped)


def test_resuming_what_cannot_be(stopped: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shortrun.recipe(model)
    for target, fragments in {
        "runs/nowhere": ["runs/nowhere"],
        "runs/short/checkpoint-8": ["runs/short/checkpoint-8"],
        str(model): ["recipe.yaml"],
    }.items():
        assert shortrun.command("train", "--resume", target) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and all(fragment in line for fragment in fragments), line
    assert shortrun.command("train", "short.yaml", "--resume", str(model)) == 2
    assert "holds no complete checkpoint" in capfd.readouterr().err
    assert shortrun.command("train", "short.yaml", "optim.lr=0.5", "--resume", "runs/short") == 2
    assert "resume: objective.inner_steps" not in capfd.readouterr().err
    # A folder with checkpoints of something else, and a run that saved none.
    (stopped / "recipe.yaml").unlink()
    assert shortrun.command("train", "short.yaml", "--resume", "runs/short") == 2
    assert "holds no recipe.yaml, so it is not the folder of a run" in capfd.readouterr().err
    assert shortrun.command("train", "short.yaml", "name=other", "optim.steps=1") == 0
    capfd.readouterr()
    assert shortrun.command("train", "--resume", "runs/other") == 2
    assert "holds no complete checkpoint; set run.save_every" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_run_that_has_not_finished(stopped: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert shortrun.command(name, "runs/short") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "holds neither adapter nor model, the run has not finished" in line
    assert "evaluate runs/short/checkpoint-3, or finish it (unmask train --resume runs/short)" in line
    assert shortrun.command(name, "runs/short/checkpoint-3") == 0
    assert shortrun.command(name, "runs/short/checkpoint-7") == 2
    assert shortrun.command(name, "runs") == 2
    assert "without recipe.yaml" in capfd.readouterr().err


def test_the_results_file_is_tried_before_the_work(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shortrun.recipe(model)
    assert shortrun.command("train", "short.yaml", "--json", "nowhere/result.json") == 2
    assert "nowhere/result.json" in capfd.readouterr().err and not Path("runs").exists()
    assert shortrun.command("train", "short.yaml", "optim.steps=1", "--json", "result.json") == 0
    assert json.loads(Path("result.json").read_text())["n"] == 5
