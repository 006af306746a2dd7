"""UnmaskTrainer: transformers' Trainer whose step collects rollouts, plans, and back-propagates chunk by chunk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..policies.adapters import attach_adapter
from ..policies.denoiser import Denoiser, load_denoiser
from ..policies.reference import build_reference
from ..recipes.registry import RecipeError
from ..recipes.tasks import Row, Rows, Stored
from ..rewards import Reward, RewardTable, build_rewards, check_columns, score
from ..rollouts.noise import generator
from ..rollouts.sampler import Sampler, build_sampler
from ..rollouts.worker import RolloutBatch, RolloutWorker
from . import advantages
from .checkpoints import CheckpointWriteError, finish_checkpoint, load_plan, plan_path, save_plan
from .config import UnmaskConfig
from .distributed import barrier, rank, reduce_gradients, total, world_size
from .evaluate import evaluate, heldout_rows
from .objective import Objective, build_objective
from .optimizers import build_optimizer
from .plan import Plan
from .progress import Progress
from .records import Records, write_rollouts

logger = logging.getLogger(__name__)

CJ_GRPO = {
    "estimator": "trace",
    "unit": "token",
    "surrogate": "ppo_clip",
    "weight": "per_step_mean",
    "divergence": "k3",
}


class UnmaskTrainer(Trainer):
    """Trains a denoiser on the trajectories it samples; constructor and arguments are named as in TRL's GRPOTrainer.

    `model` is a Denoiser, a checkpoint folder, a hub id or `unmask:tiny`; `reward_funcs` are names, TRL functions
    or Rewards; datasets are sequences of rows with a `prompt` (or task Rows). `sampler`, `objective` and `advantage`
    default to blocks of 32 with two tokens a step, the CJ-GRPO row, and group_mean. One `training_step` is one
    optimizer step. Raises ValueErrors that name value, rule and remedy.
    """

    _plan: Plan | None
    _metrics: dict[str, float]

    def __init__(
        self,
        model: Denoiser | str,
        reward_funcs: Sequence[Any] | Any,
        args: UnmaskConfig,
        train_dataset: Sequence[Row] | Rows,
        eval_dataset: Sequence[Row] | Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        sampler: Sampler | None = None,
        eval_sampler: Sampler | None = None,
        objective: Objective | None = None,
        advantage: Callable[[Tensor, Tensor], Tensor] = advantages.group_mean,
        optim: dict[str, Any] | None = None,
    ) -> None:
        denoiser = load_denoiser(model) if isinstance(model, str) else model
        if peft_config is not None:
            denoiser = attach_adapter(denoiser, peft_config, seed=args.seed)
        self.denoiser, self.optim = denoiser, optim or {}
        self.config, self.folder = args, Path(str(args.output_dir))
        self.tokenizer = processing_class or denoiser.tokenizer
        self.rewards = _rewards(reward_funcs, args.reward_weights)
        self.rows, self.eval_rows = _as_rows(train_dataset, args.seed), None
        check_columns(self.rewards, self.rows.row(0))
        sampler = sampler or default_sampler(args)
        self.sampler = replace(sampler, temperature=args.temperature)
        self.objective: Objective = objective or default_objective(args)
        self.advantage = advantage
        self.reference = build_reference(denoiser, args.reference, beta=self.objective.beta)
        self.worker = RolloutWorker(
            denoiser=denoiser,
            tokenizer=self.tokenizer,
            sampler=self.sampler,
            scorer=self._score,
            group=args.num_generations,
            canvas=args.max_completion_length,
            prompt_limit=args.max_prompt_length,
            seed=args.seed,
            micro_batch=args.rollout_batch_size,
        )
        eval_temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
        self.eval_worker = replace(self.worker, sampler=replace(eval_sampler or sampler, temperature=eval_temperature))
        if eval_dataset is not None:
            self.eval_rows = heldout_rows(_as_rows(eval_dataset, args.seed, heldout=True), args.eval_problems)
        self._plan, self._metrics = None, {}
        self.records = Records(self.folder)
        super().__init__(
            model=denoiser.model,
            args=args,
            train_dataset=range(args.max_steps),  # type: ignore[arg-type]
            eval_dataset=self.eval_rows,  # type: ignore[arg-type]
            callbacks=[*(callbacks or []), PlanKeeper(self)],
        )
        self.model_accepts_loss_kwargs = False
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        if rank() == 0:
            self.add_callback(Progress())

    def _score(self, rows: Any, prompts: Any, completions: Any, completion_ids: Any) -> RewardTable:
        """Score a batch; reward functions see the Trainer's state, as TRL's do."""
        return score(self.rewards, rows, prompts, completions, completion_ids, trainer_state=self.state)

    def get_train_dataloader(self) -> DataLoader:
        """Return step numbers; what a step trains on follows from its number, in every process and after a resume."""
        return DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=_step_number)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters once."""
        if self.optimizer is None:
            args = self.args
            defaults: dict[str, Any] = {
                "lr": args.learning_rate,
                "weight_decay": args.weight_decay,
                "betas": (args.adam_beta1, args.adam_beta2),
            }
            self.optimizer = build_optimizer(self.denoiser.model.named_parameters(), **(defaults | self.optim))
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect rollouts when the last plan is used up, and add one update's gradient; returns its loss."""
        step = int(inputs["step"])
        started = time.perf_counter()
        if self._plan is None or step % self.config.num_iterations == 0:
            batch = self._collect(step)
            batch = batch.with_advantage(self.advantage(batch.rewards.total_B, batch.group_B))
            self._report(batch, step)
            self._plan = self._make_plan(batch, step)
        planned = time.perf_counter()
        model.train()
        statistics = self.objective.backward(self.denoiser, self._plan)
        reduce_gradients(self.denoiser.model.parameters(), average=False)
        self._metrics |= {f"train/{name}": value for name, value in statistics.items() if name != "loss"}
        self._metrics["time/update_s"] = time.perf_counter() - planned
        self._metrics["time/step_s"] = time.perf_counter() - started
        return torch.tensor(statistics["loss"], device=self.args.device)

    def _collect(self, step: int) -> RolloutBatch:
        """Return this rank's share of batch `step // num_iterations`."""
        number, prompts = step // self.config.num_iterations, self.config.num_prompts // world_size()
        first = rank() * prompts
        rows = [self.rows.row(number * self.config.num_prompts + first + offset) for offset in range(prompts)]
        self.denoiser.model.eval()
        return self.worker.collect(rows, step=number, first_id=first)

    def _make_plan(self, batch: RolloutBatch, step: int) -> Plan:
        """Return the plan of a batch; every inner step reuses it."""
        assert batch.advantage_B is not None
        device = self.denoiser.device
        return self.objective.plan(
            self.denoiser,
            self.reference,
            batch.trajectory.to(device),
            batch.advantage_B.to(device),
            rng=generator(self.args.seed, "estimator", step),
            sampler=self.sampler,
        )

    def _report(self, batch: RolloutBatch, step: int) -> None:
        """Add a batch's means over all ranks to the step's metrics, and store its rollouts when due."""
        share = len(batch) / (self.config.num_prompts * self.config.num_generations)
        own = batch.metrics | batch_metrics(batch)
        self._metrics |= {name: total(value * share) for name, value in sorted(own.items())}
        every, number = self.config.log_rollouts_every, step // self.config.num_iterations
        if every and number % every == 0:
            write_rollouts(self.folder, batch, step, rank())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out exact rate, its standard error, reward, NFE and tokens a second."""
        rows = (
            self.eval_rows
            if eval_dataset is None
            else heldout_rows(_as_rows(eval_dataset, self.args.seed, heldout=True), self.config.eval_problems)
        )
        if not rows:
            raise RecipeError("evaluate: there are no held-out problems; pass eval_dataset.")
        result = evaluate(self.eval_worker, rows)
        values = {name: value for name, value in result.as_dict().items() if isinstance(value, int | float)}
        clocks = ("wall_s", "tokens_per_s")
        named = {
            f"time/{metric_key_prefix}_{k}" if k in clocks else f"{metric_key_prefix}/{k}": v for k, v in values.items()
        }
        self.log(named)
        # Callbacks and best-model selection look for the prefix that Trainer uses.
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record to the run folder and to every tracker."""
        if "loss" in logs:
            logs = {**logs, **self._metrics}
            self._metrics = {}
        if rank() == 0 and not any(key.startswith("train_") for key in logs):
            self.records.write(self.state.global_step, {k: v for k, v in logs.items() if k != "epoch"})
        super().log(logs, start_time)


class PlanKeeper(TrainerCallback):
    """Keeps checkpoints whole: adds the plan in flight, marks them complete, drops the oldest, restores on resume."""

    def __init__(self, trainer: UnmaskTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the checkpoint that Trainer has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            save_plan(plan_path(folder, rank()), self.trainer._plan)
            barrier()
            if rank() == 0:
                finish_checkpoint(folder, step=state.global_step, keep=args.keep_checkpoints)
        except OSError as error:
            raise CheckpointWriteError(f"{folder}: {error}; earlier checkpoints are intact.") from error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the plan in flight and rewind the records when the run is a resumed one."""
        if state.global_step == 0:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trainer._plan = load_plan(plan_path(folder, rank()), self.trainer.sampler)
        if rank() == 0:
            self.trainer.records.rewind(state.global_step)


def batch_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Return rewards, outcome shares and the share of rollouts whose group gives no signal."""
    rewards, count = batch.rewards, max(len(batch), 1)
    values = {"reward/total": _mean(rewards.total_B)}
    for index, name in enumerate(rewards.names):
        values[f"reward/{name}"] = _mean(rewards.value_BR[:, index])
    for outcome in ("ok", "wrong", "unparsable", "timeout", "error"):
        values[f"outcome/{outcome}"] = sum(o == outcome for o in rewards.outcome) / count
    if batch.advantage_B is not None:
        values["advantage/zero_share"] = (batch.advantage_B.nan_to_num(0.0) == 0).double().mean().item()
    return values | {f"custom/{name}": value for name, value in rewards.metrics.items()}


def _mean(value: Tensor) -> float:
    kept = value[~value.isnan()].double()
    return kept.mean().item() if len(kept) else 0.0


def default_sampler(args: UnmaskConfig) -> Sampler:
    """Return the sampler used when none is given: blocks of (at most) 32, two tokens a step, by confidence."""
    size = math.gcd(args.max_completion_length, 32)
    section = {"schedule": {"name": "blocks", "size": size, "per_step": min(2, size)}}
    return build_sampler(section, temperature=args.temperature)


def default_objective(args: UnmaskConfig) -> Objective:
    """Return CJ-GRPO with the arguments' clip range, beta and chunk."""
    clip = {"name": "ppo_clip", "low": args.epsilon, "high": args.epsilon_high or args.epsilon}
    return build_objective({**CJ_GRPO, "surrogate": clip, "beta": args.beta, "chunk": args.chunk_size})


def _rewards(functions: Any, weights: list[float] | None) -> list[Reward]:
    entries = list(functions) if isinstance(functions, list | tuple) else [functions]
    rewards = build_rewards(entries)
    if weights is None:
        return rewards
    if len(weights) != len(rewards):
        raise RecipeError(f"reward_weights: {len(weights)} weights for {len(rewards)} rewards; give one each.")
    return [replace(reward, weight=weight) for reward, weight in zip(rewards, weights, strict=True)]


def score_batch(rewards: list[Reward], rows: Any, prompts: Any, completions: Any, completion_ids: Any) -> RewardTable:
    """Score a worker's batch: `score` with the rewards first, so that they can be bound."""
    return score(rewards, rows, prompts, completions, completion_ids)


def _as_rows(dataset: Any, seed: int, *, heldout: bool = False) -> Rows:
    """Return a dataset as Rows; RecipeError when it is empty or its rows have no prompt."""
    if hasattr(dataset, "row") and hasattr(dataset, "size"):
        return dataset
    rows = [dict(row) for row in dataset]
    if not rows:
        raise RecipeError("train_dataset: the dataset is empty.")
    if "prompt" not in rows[0]:
        raise RecipeError(f"train_dataset: rows need a column 'prompt'; there are {', '.join(sorted(rows[0]))}.")
    return Stored(rows, "heldout" if heldout else "train", seed)


def _step_number(items: list[int]) -> dict[str, int]:
    (step,) = items
    return {"step": step}
