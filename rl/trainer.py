"""UnmaskTrainer: transformers' Trainer whose step collects rollouts, plans, and back-propagates chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..policies.denoiser import Denoiser
from ..policies.reference import build_reference
from ..recipes.sections import AlarmsSection
from ..recipes.tasks import Row, Rows
from ..rewards import Scorer, ScoringConfig, check_columns
from ..rollouts.canvases import Start
from ..rollouts.sampler import Sampler
from ..rollouts.worker import RolloutBatch, RolloutWorker
from . import advantages
from .alarms import Alarms
from .checkpoints import PlanKeeper, file_errors, starting_point
from .collecting import Collector, Exploration
from .config import UnmaskConfig
from .crediting import asks_for_drafts
from .defaults import default_sampler
from .distributed import gather_objects, rank, reduce_gradients
from .evaluate import evaluate
from .finite import require_finite_gradient
from .guards import batch_kept, sounded, stop_if_asked
from .joint import AnyPlan, Joint, credit_batch, learned_by, settled
from .mismatch import mismatch_by_step
from .objective import Objective
from .optimizers import build_optimizer
from .planmaking import plans_of
from .planning import Planning
from .progress import Progress
from .records import Records, batch_metrics, merge_metrics, write_rollouts
from .settings import peak_memory_gb
from .sharding import (
    gathered,
    leave_out_moments,
    require_shardable,
    save_for_resuming,
    save_trained,
    shard_for_training,
    whole,
)
from .trainer_inputs import as_rows, check_group, check_shares, heldout_of, prepare, rewards_of, steps_of
from .value import ValueSettings, build_critic


class UnmaskTrainer(Trainer):
    """Trains a denoiser on the trajectories it samples; constructor and arguments are named as in TRL's GRPOTrainer.

    `model` is a Denoiser, a model folder, a hub id or `unmask:tiny`; `reward_funcs` are names, TRL reward functions or
    Rewards; datasets are sequences of rows with a `prompt` (or task Rows). A `peft_config` without target modules
    adapts the family's linear layers. `sampler` (at the temperature of `args`), `objective` and `advantage` default to
    blocks of 32 with two tokens a step, the CJ-GRPO row, and group_mean; `start` is a canvas part (default: masks), and
    `exploration` what is done for groups that fail or tell nothing (default: nothing). One `training_step` is one step.
    With `planning` the planner is what is learned, with an `objective` that is Joint it and the denoiser are; a `value`
    model learns beside either.
    `alarms` say what a run that goes wrong warns of, or stops at.
    """

    args: UnmaskConfig
    # Objective, Planning or Joint: what one credits and plans is its own and goes to no other.
    objective: Any

    def __init__(
        self,
        model: Denoiser | str | Path,
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
        objective: Objective | Joint | None = None,
        advantage: Callable[[Tensor, Tensor], Tensor] = advantages.group_mean,
        optim: dict[str, Any] | None = None,
        scoring: ScoringConfig | None = None,
        start: Callable[..., Start] | None = None,
        exploration: Exploration | None = None,
        planning: Planning | None = None,
        value: ValueSettings | None = None,
        alarms: AlarmsSection | None = None,
    ) -> None:
        self.denoiser = denoiser = prepare(model, peft_config, args.seed)
        scoring = scoring or ScoringConfig()
        self.rewards = rewards_of(reward_funcs, args.reward_weights, scoring.allow_code_execution)
        self.rows = as_rows(train_dataset, args.seed, "train_dataset")
        check_columns(self.rewards, self.rows.row(0))
        self.eval_rows = None if eval_dataset is None else heldout_of(eval_dataset, args)
        args.max_steps = steps_of(args, self.rows)
        check_group(args.num_generations, advantage)
        sampler = replace(sampler or default_sampler(args), temperature=args.temperature)
        tested = replace(eval_sampler or sampler, temperature=args.evaluation_temperature)
        self.objective, self.planning, self.sampler, tested = settled(objective, planning, args, sampler, tested)
        self.learned: Any = learned_by(self.objective, denoiser)
        self.advantage, self.optim, self.value = advantage, optim or {}, value
        self.alarms = Alarms(alarms or AlarmsSection())
        self.worker = RolloutWorker(
            denoiser=denoiser,
            tokenizer=processing_class or denoiser.tokenizer,
            sampler=self.sampler,
            scorer=Scorer(self.rewards, scoring, state=lambda: self.state),
            group=args.num_generations,
            canvas=args.max_completion_length,
            prompt_limit=args.max_prompt_length,
            seed=args.seed,
            micro_batch=args.rollout_batch_size,
            drafts=asks_for_drafts(self.objective, self.advantage),
            start=start,
        )
        self.collector = Collector(self.worker, self.rows, prompts=args.num_prompts, exploration=exploration)
        self.eval_worker = replace(self.worker, sampler=tested, drafts=False)
        super().__init__(
            model=self.learned[0],
            args=args,
            train_dataset=range(args.max_steps),  # type: ignore[arg-type]
            eval_dataset=self.eval_rows,  # type: ignore[arg-type]
            callbacks=[*(callbacks or []), PlanKeeper(self)],
        )
        self._finish_setup(args)

    def _finish_setup(self, args: UnmaskConfig) -> None:
        """Do what needs the process group and the device, which Trainer's constructor has set up."""
        self.model_accepts_loss_kwargs, self.folder = False, Path(str(args.output_dir))
        self.records = Records(self.folder)
        # The plans in flight, one or one an inner step, and their batch (not after a resume between inner steps); the
        # checkpoint that `train` resumes from; whether it was read.
        self.plans: list[AnyPlan] = []
        self.batch: RolloutBatch | None = None
        self.checkpoint: Path | None = None
        self.begun, self._metrics = False, dict[str, Any]()
        check_shares(args)
        if args.sharding == "fsdp":
            require_shardable(self.denoiser, self.optim.get("name", "adamw"))
        self.reference: Any = build_reference(self.denoiser, args.reference, beta=self.objective.beta)
        self.critic = build_critic(self.value, self.denoiser, self.optim, args.max_grad_norm)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.progress = Progress()
        if rank() == 0:
            self.add_callback(self.progress)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train to `max_steps` and return Trainer's output; `resume_from_checkpoint` is True (the newest) or a folder.

        Raises CheckpointReadError for a checkpoint that is missing, unfinished or damaged, and when a new run would
        write among the checkpoints of an earlier one; CheckpointWriteError when the disk is full; NonFiniteError,
        RatioError and AlarmError, which name the folder that the batch was saved to.
        """
        folder, self.begun = self.folder, False
        self.checkpoint = starting_point(folder, resume_from_checkpoint, sharded=self.denoiser.root is not None)
        try:
            with file_errors(folder, lambda: None if self.begun else self.checkpoint):
                return super().train(str(self.checkpoint) if self.checkpoint else None, trial, ignore_keys_for_eval)
        finally:
            self.progress.close()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as peft does, or all weights in the vendor's layout, which `load_denoiser` reads."""
        folder, alone = Path(output_dir or self.folder), isinstance(self.objective, Planning)
        if self.planning is not None and not _internal_call:
            self.planning.save(folder if alone else folder / "planner", self.denoiser)
            if alone:
                return
        if (state := gathered(self.denoiser)) is not None:
            if self.args.should_save:
                save = save_for_resuming if _internal_call else save_trained
                save(self.denoiser, folder, state)
        elif _internal_call or isinstance(self.denoiser.model, PeftModel):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.denoiser.save(folder)

    def get_train_dataloader(self) -> DataLoader:
        """Return step numbers; what a step trains on follows from its number, in every process and after a resume."""
        return DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=_step_number)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over the trainable parameters once."""
        if self.optimizer is None:
            if self.args.sharding == "fsdp":
                # From here on: what went before, reading a checkpoint included, saw plain tensors.
                shard_for_training(self.accelerator, self.denoiser, self.reference)
            self.optimizer = _optimizer_of(self)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collect rollouts when the last plans are used up, and add one update's gradient; returns its loss."""
        step = int(inputs["step"])
        started = time.perf_counter()
        number, inner = divmod(step, self.args.num_iterations)
        if not self.plans or inner == 0:
            batch = self._collect(step)
            batch, credit = credit_batch(self.objective, self.worker, batch, self.advantage, number)
            self.batch = batch
            self._report(batch, step)
            key = (self.args.seed, "estimator", step)
            self.plans = plans_of(self, batch.trajectory, credit, key, inner_steps=self.args.num_iterations)
            self._metrics |= mismatch_by_step(self.plans[0], self.sampler, self.objective.old)
            self._metrics |= {} if self.critic is None else self.critic.metrics
        planned = time.perf_counter()
        model.train()
        with batch_kept(self, step):
            statistics = _differentiate(self, self.plans[inner % len(self.plans)], step)
        self._metrics |= {f"train/{name}": value for name, value in statistics.items() if name != "loss"}
        self._metrics["time/update_s"] = time.perf_counter() - planned
        self._metrics["time/step_s"] = time.perf_counter() - started
        self._metrics["time/memory_gb"] = peak_memory_gb(self.args.device)
        return torch.tensor(statistics["loss"], device=self.args.device)

    def _collect(self, step: int) -> RolloutBatch:
        """Return this rank's share of batch `step // num_iterations`."""
        self.denoiser.model.eval()
        with whole(self.denoiser):
            return self.collector.collect(step // self.args.num_iterations)

    def _report(self, batch: RolloutBatch, step: int) -> None:
        """Add a batch's means over all ranks to the step's metrics, and store its rollouts when due."""
        self._metrics |= merge_metrics(gather_objects(batch_metrics(batch)))
        every, number = self.args.log_rollouts_every, step // self.args.num_iterations
        if every and number % every == 0:
            write_rollouts(self.folder, batch, step, rank())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the held-out exact rate, its standard error, reward, NFE and tokens a second."""
        rows = self.eval_rows
        if eval_dataset is not None:
            rows = heldout_of(eval_dataset, self.args)
        with whole(self.denoiser):
            result = evaluate(self.eval_worker, rows or [])
        logged, metrics = result.metrics(metric_key_prefix)
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record to the run folder and to every tracker."""
        if "loss" in logs:
            logs = {**logs, **self._metrics}
            self._metrics = {}
        if not any(key.startswith("train_") for key in logs):
            logs = {**logs, **sounded(self, logs)}
            if rank() == 0:
                self.records.write(self.state.global_step, {k: v for k, v in logs.items() if k != "epoch"})
        # Trackers take numbers alone.
        super().log({k: v for k, v in logs.items() if not isinstance(v, list | str)}, start_time)
        stop_if_asked(self)


def _optimizer_of(trainer: UnmaskTrainer) -> torch.optim.Optimizer:
    """Return the optimizer over what a trainer learns."""
    args = trainer.args
    defaults: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    defaults["betas"] = (args.adam_beta1, args.adam_beta2)
    knobs = defaults | trainer.optim
    optimizer = build_optimizer(trainer.learned[0].named_parameters(), **knobs)
    if isinstance(trainer.objective, Joint):
        optimizer = trainer.objective.with_planner(optimizer, knobs)
    if trainer.denoiser.root is not None:
        leave_out_moments(optimizer)
    return optimizer


def _differentiate(trainer: UnmaskTrainer, plan: AnyPlan, step: int) -> dict[str, float]:
    """Leave the gradient of an update in the parameters, summed over ranks, and return its statistics."""
    statistics = trainer.objective.backward(trainer.denoiser, plan)  # type: ignore[arg-type]
    trained = [parameter for module in trainer.learned for parameter in module.parameters()]
    reduce_gradients(trained, average=False)
    require_finite_gradient(trained, step)
    if isinstance(trainer.objective, Joint):
        statistics["planner_grad_norm"] = trainer.objective.clip(trainer.args.max_grad_norm)
    return statistics


def _step_number(items: list[int]) -> dict[str, int]:
    (step,) = items
    return {"step": step}
