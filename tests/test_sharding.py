"""FSDP2 on two processes under gloo: shares of the weights that together do what one process does."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import run
from unmask.rl.checkpoints import CheckpointReadError, starting_point
from unmask.rl.cli_summary import summary
from unmask.rl.config import UnmaskConfig
from unmask.rl.export import export
from unmask.rl.memory import estimate
from unmask.rl.settings import device_of

sys.path.append(str(Path(__file__).parent))
import shortrun

BASE = ["rollout.prompts=4", "optim.steps=4", "rewards=[{name: 'toyrewards:one_sided'}]", "evaluation.every=4"]
WHOLE = ["model.lora=null", "optim.lr=1e-3", "optim.weight_decay=0.1", "objective.beta=0.05"]
KINDS = {
    "adapter": ["objective.chunk=5"],
    "all weights, reference, ratio of a rollout": [*WHOLE, "objective.unit=rollout", "objective.chunk=7"],
    "a value head": ["method=tracerl_value", "objective.estimator.merge=2", "value={network: head, lr: 1e-2}"],
}
CASES = {
    "adapter": [("gradients", "tiny", True), ("forwards", "tiny", True), ("memory", "", True)],
    "all weights": [("gradients", "tiny", False), ("memory", "", False), ("bfloat16", "tiny", False)],
    "tied": [("gradients", "tied", False)],
    "rollouts": [("rollouts", "tiny", True), ("rollouts", "sdar", False)],
    "block-causal": [("gradients", "sdar", False), ("gradients", "sdar", True), ("forwards", "sdar", False)],
    "mixture of experts": [("gradients", "llada2", False), ("forwards", "llada2", True)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortrun.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cases", shortrun.parameters(CASES, often=["adapter", "block-causal"]))
def test_shares_do_what_the_whole_does(cases: list[tuple[str, str, bool]]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unmask.rl.launch"])
    ranks = []
    for environment in shortrun.rank_environments(2):
        output = Path(f"{environment['RANK']}.txt").absolute()
        job = {"environment": environment, "output": str(output), "cases": cases}
        process = context.Process(target=runpy.run_path, args=(str(shortrun.HERE / "shardedrank.py"), {"JOB": job}))
        process.start()
        ranks.append(shortrun.Process(process, output))
    shortrun.finish(ranks)


def compare(one: Path, two: Path) -> None:
    """Assert that two runs drew the same, reported the same and learnt the same."""
    for step in (0, 2):
        shortrun.compare_rollouts(shortrun.rollouts(one, step), shortrun.rollouts(two, step))
    records = [shortrun.lines(folder / "metrics.jsonl") for folder in (one, two)]
    assert [record.keys() for record in records[0]] == [record.keys() for record in records[1]]
    updates = [[record for record in run if "loss" in record] for run in records]
    assert len(updates[0]) == 4 and any(record["grad_norm"] > 1e-3 for record in updates[0])
    for a, b in zip(*updates, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=1e-7)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-6)
        assert a["train/views"] == b["train/views"] and a["train/kl"] == pytest.approx(b["train/kl"], rel=1e-4)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for stage in ("before", "after"):
        assert results[0][stage]["reward"] == pytest.approx(results[1][stage]["reward"], abs=1e-6)
    assert shortrun.distance(one, two) < 1e-6


@pytest.mark.parametrize("overrides", shortrun.parameters(KINDS, often=["adapter"]))
def test_a_sharded_run_is_the_run(model: Path, overrides: list[str]) -> None:
    processes = shortrun.start_ranks(shortrun.recipe(model, "name=two", *BASE, *overrides, "model.sharding=fsdp"), 2)
    run.train(shortrun.recipe(model, "name=one", *BASE, *overrides))
    shortrun.finish(processes)
    compare(Path("runs/one"), Path("runs/two"))
    assert "held-out exact" in processes[0].text() and not processes[1].text()


def test_a_sharded_block_causal_run_is_the_run(tmp_path: Path) -> None:
    facts = json.loads((shortrun.HERE / "fixtures/sdar/golden.json").read_text())
    given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    load_denoiser(str(shortrun.HERE / "fixtures/sdar"), tokenizer=byte_tokenizer(), **given).save(tmp_path / "sdar")
    # As the shipped recipes decode: behind the exact cache, every rank with one forward a step.
    cache = "rollout.sampler.cache=block_causal"
    options = [*BASE, *WHOLE, cache, *(f"model.{key}={value}" for key, value in given.items())]
    processes = shortrun.start_ranks(shortrun.recipe(tmp_path / "sdar", "name=two", *options, "model.sharding=fsdp"), 2)
    run.train(shortrun.recipe(tmp_path / "sdar", "name=one", *options))
    shortrun.finish(processes)
    compare(Path("runs/one"), Path("runs/two"))


def killed_in_flight(model: Path, overrides: list[str]) -> tuple[Any, Path]:
    """Return the recipe and the folder of a sharded run that was killed between the inner steps of a batch."""
    saving = ["run.save_every=1", "run.keep=9", "objective.inner_steps=3", "optim.steps=5"]
    recipe = shortrun.recipe(model, "name=killed", *BASE, *saving, *overrides, "model.sharding=fsdp")
    processes = shortrun.start_ranks(recipe, 2)
    processes[0].wait_for(Path("runs/killed/checkpoint-4/unmask.json"))
    for process in processes:
        process.kill()
    return recipe, Path("runs/killed")


@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param([*WHOLE, "model.dtype=bfloat16"], marks=pytest.mark.slow)],
    ids=["adapter", "bfloat16 weights"],
)
def test_a_sharded_run_resumes_to_the_same_bits(model: Path, overrides: list[str]) -> None:
    recipe, folder = killed_in_flight(model, overrides)
    shortrun.finish(shortrun.start_ranks(recipe, 2, resume=folder / "checkpoint-4"))
    shortrun.finish(shortrun.start_ranks(recipe.model_copy(update={"name": "whole"}), 2))
    assert shortrun.same_weights(folder, Path("runs/whole"))
    assert (folder / "metrics.jsonl").read_bytes() == Path("runs/whole/metrics.jsonl").read_bytes()
    # What is left is what a run without sharding leaves: it is evaluated and exported by one process.
    assert export(str(folder), Path("exported"))["written_minus_merged"] == 0.0
    judge = ["rewards=[{name: 'toyrewards:mean_id'}]"]
    ends = [run.evaluate(str(path), problems=4, overrides=judge) for path in (folder, folder / "checkpoint-5")]
    assert ends[0]["reward"] == ends[1]["reward"]
    check_files(folder / "checkpoint-5", "bfloat16" in str(overrides))


def check_files(checkpoint: Path, masters: bool) -> None:
    """A checkpoint holds whole tensors in float32, whatever the forwards ran in."""
    weights = "model.safetensors" if masters else "adapter_model.safetensors"
    with (
        safe_open(checkpoint / weights, "pt") as file,
        safe_open(checkpoint / "optimizer.safetensors", "pt") as moments,
    ):
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
        assert len(moments.keys()) == 3 * len(names)  # two moments and a count of steps
    assert (checkpoint / "optimizer.pt").stat().st_size < 50_000


@pytest.mark.slow
def test_the_number_of_ranks_changes_between_batches(model: Path) -> None:
    recipe, folder = killed_in_flight(model, WHOLE)
    subprocess.run(["cp", "-r", str(folder), "runs/edge"], check=True)
    subprocess.run(["rm", "-rf", "runs/edge/checkpoint-4", "runs/edge/checkpoint-5"], check=True)
    shortrun.finish(shortrun.start_ranks(recipe, 2, resume=folder))
    shortrun.finish(shortrun.start_ranks(recipe.model_copy(update={"name": "edge"}), 4, resume=Path("runs/edge")))
    assert shortrun.distance(folder, Path("runs/edge")) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=4bit", "model.dtype=bfloat16"], "cannot share out 4bit weights; set model.quantization"),
        (["optim.optimizer=muon"], "muon needs whole ones; use optimizer adamw"),
        (["model.device=cuda:1"], "fsdp takes a device a process, not cuda:1"),
        (["model.sharding=zero"], "model.sharding: 'zero' is not allowed; choose one of none, fsdp"),
    ],
)
def test_what_cannot_be_sharded_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("cj_grpo_tiny_arithmetic.yaml", ["model.sharding=fsdp", *overrides])
    assert message in str(error.value)


def test_one_process_is_refused(model: Path) -> None:
    recipe = shortrun.recipe(model, "model.sharding=fsdp")
    with pytest.raises(RecipeError, match=r"among processes and there is one; start several \(--nproc 8\)"):
        summary(recipe, "short", 1)
    with pytest.raises(RecipeError, match=r"among processes and there is one; start several \(--nproc 8\)"):
        run.train(recipe)
    assert not Path("runs/short").exists()


@pytest.mark.parametrize(
    ("name", "published"),  # bytes of the checkpoints, in bfloat16
    [
        ("llada8b", 16_031_162_368),
        ("dream7b", 15_231_233_024),
        ("sdar4b", 8_822_848_512),
        ("llada2_mini", 32_511_286_784),
    ],
)
def test_the_shipped_recipes_fit_eight_devices(name: str, published: int) -> None:
    data = ["task={name: arithmetic}", "rewards=[{name: arithmetic}]"]
    recipe: Any = load_recipe(f"{name}_fsdp.yaml", data)
    found = estimate(recipe, 8)
    assert found is not None and found.total < 60e9
    if recipe.model.lora is None:
        # Float32 shards, an eighth of the frozen copy, and three times the former for gradients and moments.
        assert found.weights == pytest.approx(published * (2 + 1) / 8, rel=1e-6)
        assert found.optimizer == pytest.approx(published * 6 / 8, rel=1e-6)
        assert found.whole == published
    else:
        assert found.weights == pytest.approx(published / 8, rel=1e-6) and found.whole > published


def test_check_tells_the_share_of_a_device(model: Path) -> None:
    facts = [summary(shortrun.recipe(model, *options, "rollout.prompts=8"), "short") for options in
             ([], ["model.sharding=fsdp"])]  # fmt: skip
    assert "a device (weights" in facts[0]["memory"] and facts[0]["next"] == "unmask train short"
    assert "on each of 8 devices (weights" in facts[1]["memory"] and facts[1]["next"] == "unmask train short --nproc 8"
    assert "weights gathered for rollouts" in facts[1]["memory"]
    # Fewer prompts keep fewer devices busy.
    fewer = summary(shortrun.recipe(model, "model.sharding=fsdp", "rollout.prompts=12"), "short")
    assert "on each of 4 devices" in fewer["memory"]


def test_a_process_reads_weights_onto_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_of(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_a_sharded_model_is_not_read_into_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointReadError, match="has sharded its model already; resume in a new one"):
        starting_point(tmp_path, True, sharded=True)
    with pytest.raises(RecipeError, match=r"UnmaskConfig\.sharding: 'zero' is neither none nor fsdp"):
        UnmaskConfig(output_dir=str(tmp_path), sharding="zero")
