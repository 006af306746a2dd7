"""What the commands do: train, supervised training and evaluation, from a recipe or a run's folder."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..policies.adapters import lora_config
from ..policies.denoiser import Denoiser
from ..policies.saving import whole_folder
from ..recipes.loading import dump_recipe, load_recipe
from ..recipes.registry import SLOTS
from ..recipes.schema import Recipe, SftRecipe
from ..rollouts.sampler import build_sampler
from . import sft_run
from .checkpoints import checkpoint_to_resume, file_errors
from .collecting import build_exploration
from .config import UnmaskConfig
from .distributed import rank
from .evaluate import Evaluation, heldout_rows
from .evaluate import evaluate as evaluate_rows
from .manifests import run_manifest
from .planning_setup import build_objectives, planner_notes
from .runfolder import RunError, no_empty_folder, run_folder, write_atomically, write_json
from .settings import cpu_backend, device_of, rewards_of, scoring_of
from .sharding import gathered, save_trained
from .targets import evaluation_worker, load_policy, open_target
from .trainer import UnmaskTrainer
from .value import ValueSettings

logger = logging.getLogger(__name__)
WORKER = "UNMASK_WORKER"  # set in the processes that torchrun starts for us
# What a resumed run may change: nothing of it alters an update that was already planned, nor is kept in a checkpoint.
CHANGEABLE = (
    "name",
    "model.device",
    "model.attention",
    "rollout.micro_batch",
    "objective.chunk",
    "objective.ratio_limit",
    "alarms",
    "optim.steps",
    "run.directory",
    "run.keep",
    "run.report_to",
    "run.log_rollouts_every",
)


def train(recipe: Recipe, *, nproc: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Run an RL recipe and return its summary: held-out results before and after, steps, wall seconds.

    `nproc` > 1 starts torchrun on this machine. `resume` is a run's folder or one of its checkpoints.
    """
    if nproc > 1 and WORKER not in os.environ:
        from .launch import launch

        return launch(recipe, nproc, resume)
    folder, checkpoint = place(recipe, resume)
    started = time.perf_counter()
    with file_errors(folder, lambda: None), no_empty_folder(folder):
        trainer = build_trainer(recipe, folder)
        before = _begin(recipe, trainer, checkpoint)
        closing = ClosingEvaluation()
        trainer.add_callback(closing)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if "tokens" in recipe.objective.actions:
            save_policy(trainer.denoiser, folder)
        if trainer.planning is not None and rank() == 0:
            trainer.planning.save(folder / "planner", trainer.denoiser, **planner_notes(recipe))
        after = _plain(closing.metrics) if closing.metrics else _evaluated(trainer)
        summary = {
            "run": folder.name,
            "folder": str(folder),
            "steps": recipe.optim.steps,
            "before": before,
            "after": after,
            "n": after["n"],
            "wall_s": time.perf_counter() - started,
        }
        if rank() == 0:
            write_json(folder / "summary.json", summary)
            show_summary(summary, folder)
    return summary


def _begin(recipe: Recipe, trainer: UnmaskTrainer, checkpoint: Path | None) -> dict[str, Any]:
    """Write recipe and manifest of a run and return its held-out results before training (those it had, on resume)."""
    folder = trainer.folder
    if rank() == 0:
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "manifest.json", run_manifest(recipe, trainer.denoiser))
    if checkpoint is not None and (folder / "before.json").is_file():
        return json.loads((folder / "before.json").read_text())
    before = _evaluated(trainer)
    if rank() == 0:
        write_json(folder / "before.json", before)
    return before


def build_trainer(recipe: Recipe, folder: Path) -> UnmaskTrainer:
    """Return the trainer of a recipe; loads the weights."""
    denoiser = load_policy(recipe)
    config = arguments(recipe, folder)
    lora = recipe.model.lora
    peft_config = None
    if lora is not None:
        peft_config = lora_config(denoiser, **lora.model_dump())
    evaluation_sampler = (recipe.evaluation.sampler or recipe.rollout.sampler).model_dump()
    task = SLOTS["task"].build(recipe.task)
    objective, planning = build_objectives(recipe, denoiser)
    return UnmaskTrainer(
        model=denoiser,
        reward_funcs=rewards_of(recipe),
        scoring=scoring_of(recipe),
        args=config,
        train_dataset=task("train", seed=recipe.run.seed),
        eval_dataset=task("heldout", seed=0),
        peft_config=peft_config,
        sampler=build_sampler(recipe.rollout.sampler.model_dump(), temperature=recipe.rollout.temperature),
        eval_sampler=build_sampler(evaluation_sampler),
        objective=objective,
        advantage=SLOTS["advantage"].build(recipe.objective.advantage),
        start=SLOTS["canvas"].build(recipe.rollout.start, "rollout.start"),
        exploration=build_exploration(recipe.exploration.model_dump()),
        planning=planning,
        value=None if recipe.value is None else ValueSettings(**recipe.value.model_dump()),
        alarms=recipe.alarms,
        optim={"name": recipe.optim.optimizer, "matrix_lr": recipe.optim.matrix_lr, "betas": tuple(recipe.optim.betas)},
    )


def arguments(recipe: Recipe, folder: Path) -> UnmaskConfig:
    """Return the trainer's arguments for a recipe."""
    optim, run = recipe.optim, recipe.run
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[optim.schedule]
    device = device_of(recipe.model.device)
    return UnmaskConfig(
        output_dir=str(folder),
        max_steps=optim.steps,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=1,
        eval_strategy="steps" if recipe.evaluation.every else "no",
        eval_steps=recipe.evaluation.every or None,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        report_to=list(run.report_to),
        run_name=folder.name,
        seed=run.seed,
        use_cpu=device == "cpu",
        ddp_backend=cpu_backend(recipe.model.device),
        num_prompts=recipe.rollout.prompts,
        num_generations=recipe.rollout.group,
        num_iterations=recipe.objective.inner_steps,
        max_prompt_length=recipe.rollout.prompt_limit,
        max_completion_length=recipe.rollout.canvas,
        temperature=recipe.rollout.temperature,
        rollout_batch_size=recipe.rollout.micro_batch,
        reference=recipe.objective.reference,
        sharding=recipe.model.sharding,
        log_rollouts_every=run.log_rollouts_every,
        eval_problems=recipe.evaluation.problems,
        eval_temperature=recipe.evaluation.temperature,
        keep_checkpoints=run.keep,
    )


def place(recipe: Recipe, resume: Path | None) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint to resume from); a new run never overwrites an old one."""
    if resume is None:
        folder = run_folder(recipe)
        if WORKER not in os.environ:
            folder = free_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder, None
    checkpoint = checkpoint_to_resume(resume)
    _check_same_run(recipe, checkpoint.parent)
    return checkpoint.parent, checkpoint


def _check_same_run(recipe: Recipe, folder: Path) -> None:
    """Raise RunError when a run's checkpoint would go on under a recipe that asks for something else."""
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"resume: '{folder}' holds no recipe.yaml, so it is not the folder of a run.")
    old, new = (flat(r.model_dump(mode="json")) for r in (load_recipe(folder / "recipe.yaml"), recipe))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(CHANGEABLE):
            raise RunError(
                f"resume: {key} is {new.get(key)!r} in the recipe, but '{folder}' runs with {old.get(key)!r}; leave it "
                "as it is, or start a new run."
            )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keyed by dotted paths."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {path: leaf for key, inner in value.items() for path, leaf in flat(inner, f"{prefix}{key}.").items()}


def free_folder(folder: Path) -> Path:
    """Return `folder`, or the first of `folder-2`, `folder-3`, ... that no run has used."""
    number, candidate = 1, folder
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


class ClosingEvaluation(TrainerCallback):
    """Keeps the evaluation after the last step where it is due, and leaves it to `train` where it is not.

    Trainer always evaluates at the end, before it saves; a run that is extended would keep that record for ever.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cancel an evaluation at the end that `evaluation.every` does not ask for."""
        if state.global_step >= state.max_steps and not (args.eval_steps and state.global_step % args.eval_steps == 0):
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remember the results after the last step."""
        self.metrics = metrics if state.global_step >= state.max_steps else None


def _evaluated(trainer: UnmaskTrainer) -> dict[str, Any]:
    return _plain(trainer.evaluate())


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def save_policy(denoiser: Denoiser, folder: Path) -> None:
    """Write the adapter as peft does, or all weights in the vendor's layout; the folder is whole or absent.

    Every rank must call this; rank 0 writes.
    """
    state = gathered(denoiser)
    if rank() == 0:
        with whole_folder(folder / ("adapter" if isinstance(denoiser.model, PeftModel) else "model")) as unfinished:
            save_trained(denoiser, unfinished, state)


def sft(recipe: SftRecipe, *, nproc: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Run a supervised recipe and return its summary."""
    if nproc > 1 and WORKER not in os.environ:
        from .launch import launch

        return launch(recipe, nproc, resume)
    summary = sft_run.sft(recipe, resume=None if resume is None else sft_checkpoint(resume))
    if rank() == 0:
        folder = run_folder(recipe)
        title = f"{recipe.name}: {summary['wall_s'] / 60:.1f} minutes"
        table = Table("task", "held-out exact", "n", "NFE", title=title)
        for name, result in summary["heldout"].items():
            exact = f"{result['exact']:.3f} ± {result['stderr']:.3f}"
            table.add_row(name, exact, str(result["n"]), f"{result['nfe']:.1f}")
        console = Console()
        console.print(table)
        console.print(f"weights: {folder / 'model'}\nnext: unmask sample {folder / 'model'}", soft_wrap=True)
    return summary


def sft_checkpoint(resume: Path) -> Path:
    """Return the newest checkpoint of a supervised run's folder, or `resume` itself when it is one."""
    if resume.name.startswith("checkpoint-") and resume.is_dir():
        return resume
    found = get_last_checkpoint(str(resume / "checkpoints")) if (resume / "checkpoints").is_dir() else None
    if found is None:
        raise RunError(f"resume: '{resume}' holds no checkpoint; set run.save_every, or start the run anew.")
    return Path(found)


def evaluate(target: str, *, overrides: Sequence[str] = (), problems: int | None = None) -> dict[str, Any]:
    """Evaluate a run's folder, a recipe's untrained model, or a checkpoint folder; print and return the result."""
    recipe, denoiser = open_target(target, overrides)
    rewards = rewards_of(recipe)
    rows = heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=0), problems or recipe.evaluation.problems)
    worker = evaluation_worker(recipe, denoiser, rewards)
    with tqdm(total=len(rows), unit="problem", dynamic_ncols=True) as bar:
        result: Evaluation = evaluate_rows(worker, rows, progress=bar.update)
    table = Table("held-out exact", "n", "mean reward", "NFE", "length", "tokens/s", title=target)
    exact, speed = f"{result.exact:.3f} ± {result.stderr:.3f}", f"{result.tokens_per_s:.0f}"
    table.add_row(exact, str(result.n), f"{result.reward:.3f}", f"{result.nfe:.1f}", f"{result.length:.1f}", speed)
    console = Console()
    console.print(table)
    console.print("outcomes: " + ", ".join(f"{name} {count}" for name, count in sorted(result.outcomes.items())))
    console.print(f"next: unmask sample {target}", soft_wrap=True)
    return result.as_dict() | {"target": target, "manifest": run_manifest(recipe, denoiser)}


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print before and after, and where to look next."""
    title = f"{summary['run']}: {summary['wall_s']:.0f} s"
    table = Table("", "held-out exact", "mean reward", "NFE", "length", title=title)
    for name in ("before", "after"):
        row = summary[name]
        exact = f"{row['exact']:.3f} ± {row['stderr']:.3f}"
        table.add_row(name, exact, f"{row['reward']:.3f}", f"{row['nfe']:.1f}", f"{row['length']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"n = {summary['n']} held-out problems; metrics, rollouts and recipe are in {folder}", soft_wrap=True)
    console.print(f"next: unmask sample {folder}    |    unmask evaluate {folder} --problems 1000", soft_wrap=True)
