"""Runs of a tiny random model that take a second, in this process or in one of their own that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.policies.planner import Planner, load_planner, new_planner
from unmask.recipes.loading import dump_recipe, load_recipe
from unmask.recipes.registry import SLOTS
from unmask.recipes.schema import Recipe
from unmask.rl import cli, run
from unmask.rl.trainer import UnmaskTrainer

HERE = Path(__file__).parent
RECIPE = """
name: short
model: {path: MODEL, device: cpu, lora: {rank: 2}}
task: {name: arithmetic, level: easy}
rollout:
  prompts: 2
  group: 4
  canvas: 16
  prompt_limit: 64
  sampler: {schedule: {name: blocks, size: 8, per_step: 2}, score: confidence, selection: top}
rewards: [{name: "toyrewards:mean_id"}]
method: cj_grpo
objective: {inner_steps: 2, beta: 0.0}
optim: {lr: 1.0e-2, steps: 4}
evaluation: {problems: 5, temperature: 0.0}
run: {directory: runs, log_rollouts_every: 1}
"""
# Overrides that make of it a run which trains a planner as well.
JOINT = [
    "method=joint",
    "planner={width: 16, mlp: 32, lr: 3e-3, alpha: [0.5, 2.0], expert: {levels: [0.5], warmup: 1}}",
    "rollout.sampler={schedule: {name: blocks, size: 8, per_step: 1}, score: planner, selection: planned}",
    "objective.estimator={name: trace, steps: uniform_k, k: 2, tokens: all}",
]


def parameters(kinds: dict[str, Any], *, often: Sequence[str]) -> list[Any]:
    """Return the named kinds as parameters; those not in `often` take long and run with the slow tests."""
    assert set(often) <= set(kinds)
    return [pytest.param(kinds[name], id=name, marks=() if name in often else pytest.mark.slow) for name in kinds]


def command(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unmask", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def poisoned(at: int) -> Callable[..., Any]:
    """Return a training_step before whose update `at` a weight becomes NaN, as a bad kernel would make it."""
    whole = UnmaskTrainer.training_step

    def training_step(self: UnmaskTrainer, module: Any, inputs: dict[str, int], count: Any = None) -> Any:
        if inputs["step"] == at:
            with torch.no_grad():
                next(p for p in self.denoiser.model.parameters() if p.requires_grad).fill_(torch.nan)
        return whole(self, module, inputs, count)

    return training_step


def decided_denoiser() -> Denoiser:
    """Return a random model that prefers some tokens and positions; the initialisation alone is nearly uniform."""
    made = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64, seed=1)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(20)
        for layer in made.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
    return made


def planner_run(recipe: Recipe, *, resume: int) -> tuple[Path, list[dict[str, Any]], Planner]:
    """Train a planner, and once more from checkpoint `resume`: it has learned, both end alike, and so does evaluation.

    Returns the run's folder, its records of updates, and the planner.
    """
    folder = Path(run.train(recipe)["folder"])
    planner, records = load_planner(folder), [record for record in lines(folder / "metrics.jsonl") if "loss" in record]
    state = planner.network.state_dict()
    start = new_planner(planner.spec, seed=recipe.run.seed).network.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in state.items())
    again = run.train(recipe, resume=folder / f"checkpoint-{resume}")
    same = load_file(Path(again["folder"]) / "planner" / "planner.safetensors")
    for name, value in state.items():
        assert torch.equal(value, same[name]), name
    assert run.evaluate(str(folder))["nfe"] == pytest.approx(again["after"]["nfe"])
    return folder, records, planner


def save_model(folder: Path) -> Path:
    """Write a random model of 30 thousand parameters."""
    denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64)
    # The small initial weights of a deep model would leave this one's distributions flat: nothing could be told apart.
    with torch.no_grad():
        for parameter in denoiser.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    denoiser.save(folder)
    return folder


def recipe(model: Path, *overrides: str) -> Recipe:
    """Return the short recipe with overrides; `toyrewards` must be on the path and runs go below the current folder."""
    Path("short.yaml").write_text(RECIPE.replace("MODEL", str(model)))
    loaded = load_recipe("short.yaml", overrides)
    assert isinstance(loaded, Recipe)
    return loaded


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights(folder: Path) -> dict[str, Tensor]:
    """Return what a run has trained, a planner among it."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    found = load_file(adapter if adapter.is_file() else folder / "model" / "model.safetensors")
    planner = folder / "planner" / "planner.safetensors"
    return found | (load_file(planner) if planner.is_file() else {})


def same_weights(one: Path, other: Path) -> bool:
    """Tell whether two runs ended with the same bits."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(folder: Path) -> list[str]:
    """Return the names of a run's complete checkpoints."""
    return sorted(path.parent.name for path in folder.glob("checkpoint-*/unmask.json"))


@dataclass
class Process:
    """A process that runs a recipe, or one rank of it."""

    process: Any
    output: Path

    def kill(self) -> None:
        """Kill it as the kernel does when memory is short."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, seconds: float = 120.0) -> int:
        """Return its exit code."""
        self.process.join(seconds)
        assert not self.process.is_alive(), self.text()
        return self.process.exitcode

    def wait_for(self, path: Path, seconds: float = 120.0) -> None:
        """Wait until it has written a file."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert self.process.is_alive() and time.monotonic() < end, f"{path} never came: {self.text()}"
            time.sleep(0.001)

    def text(self) -> str:
        """Return what it has printed."""
        return self.output.read_text() if self.output.is_file() else ""


def start(loaded: Recipe, *, resume: Path | None = None, rank: int = 0, ranks: int = 1, **job: Any) -> Process:
    """Start `unmask.rl.launch` as torchrun does, in a fork of a server that has only imported unmask."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unmask.rl.launch"])
    # A file for each: one that is written again for the next rank may be read while it is empty.
    written, output = (Path(f"{loaded.name}-{rank}.{kind}").absolute() for kind in ("yaml", "txt"))
    written.write_text(dump_recipe(loaded))
    environment = {"UNMASK_WORKER": "1", "OMP_NUM_THREADS": "1", **job.pop("environment", {})}
    arguments = [str(written), *(["--resume", str(resume)] if resume else [])]
    job = {"environment": environment, "folder": os.getcwd(), "output": str(output), "arguments": arguments, **job}
    process = context.Process(target=runpy.run_path, args=(str(HERE / "onerank.py"), {"JOB": job}))
    process.start()
    return Process(process, output)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return the variables by which the processes of a new group find each other, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start_ranks(loaded: Recipe, ranks: int, *, resume: Path | None = None) -> list[Process]:
    """Start the ranks of one run."""
    environments = rank_environments(ranks)
    return [start(loaded, resume=resume, rank=r, environment=environments[r]) for r in range(ranks)]


def finish(processes: Sequence[Process]) -> None:
    """Wait for processes that must end well; where one does not, the others would wait for it for ever."""
    try:
        for process in processes:
            assert process.wait() == 0, process.text()
    finally:
        for process in processes:
            if process.process.is_alive():
                process.kill()


def recipe_rows() -> Any:
    """Return the rows of a task without end."""
    return SLOTS["task"].build("arithmetic")("train", seed=0)


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the rollouts of a batch from the files of all ranks."""
    files = sorted((folder / "rollouts").glob(f"step-{step:06}*.parquet"), key=lambda path: path.stem)
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def distance(one: Path, two: Path) -> float:
    """Return by how much the trained weights of two runs differ, relative to their norm."""
    a, b = (torch.cat([w.flatten() for _, w in sorted(weights(path).items())]) for path in (one, two))
    return ((a - b).norm() / a.norm()).item()


def compare_rollouts(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """Assert that two runs drew the same rollouts."""
    assert len(one) == len(two) == 16
    for a, b in zip(one, two, strict=True):
        for exact in ("rollout_id", "group", "prompt", "tokens", "source", "born", "nfe", "outcome", "completion"):
            assert a[exact] == b[exact], exact
        assert a["reward"] == b["reward"] and a["advantage"] == b["advantage"]
        assert torch.allclose(torch.tensor(a["logprob"]), torch.tensor(b["logprob"]), rtol=0, atol=1e-5)


def compare_metrics(one: Path, two: Path) -> None:
    """Assert that two runs of test_ranks' recipe reported the same numbers, and that there was something to learn."""
    records = [lines(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(records[0]) == len(records[1])
    counts = ("step", "n", "exact", "tokens", "views", "rollouts", "mass", "nfe", "length")
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key.rpartition("/")[2] in counts:
                assert value == pytest.approx(b[key], rel=1e-12), key
            elif key == "loss":
                assert value == pytest.approx(b[key], rel=1e-6, abs=1e-6), key
            else:
                assert value == pytest.approx(b[key], rel=1e-4, abs=2e-6), key
    updates = [record for record in records[0] if "loss" in record]
    signal = [record["grad_norm"] > 0 for record in updates]
    # The third batch teaches nothing unless a reference pulls; its steps must be the same empty ones on both sides.
    assert signal[0] and (signal[4] or updates[4]["train/rollouts"] == 0)
