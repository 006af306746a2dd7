"""UnmaskConfig: transformers' TrainingArguments plus the names that TRL's GRPOConfig uses for the same things."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..recipes.registry import RecipeError

# GRPOConfig's name -> ours; the value carries over unchanged.
SAME_NAMES = (
    "num_generations",
    "max_completion_length",
    "temperature",
    "beta",
    "num_iterations",
    "epsilon",
    "epsilon_high",
)
# Fields that need no counterpart because the default, and only the default, is what unmask does anyway.
DERIVED = ("generation_batch_size", "steps_per_generation", "num_generations_eval")


@dataclass
class UnmaskConfig(TrainingArguments):
    """Arguments of `UnmaskTrainer`; every field of TrainingArguments keeps its meaning.

    One optimizer step is one `training_step`: a batch of `num_prompts` x `num_generations` rollouts over all ranks is
    collected every `num_iterations` steps. `per_device_train_batch_size` and `gradient_accumulation_steps` must stay 1,
    because the objective splits its own batch (`chunk_size` views a forward, gradients summed).
    """

    logging_steps: float = field(default=1, metadata={"help": "Updates between log records."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts a batch, all ranks together."})
    num_generations: int = field(default=8, metadata={"help": "Rollouts of each prompt (group)."})
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on each batch (inner steps)."})
    max_prompt_length: int = field(default=512, metadata={"help": "Longest prompt in tokens; longer ones are refused."})
    max_completion_length: int = field(default=256, metadata={"help": "Canvas length in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the draw and of its log-probability."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio when no objective is given."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip; None: epsilon."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the divergence when no objective is given."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward; None: 1."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Rollouts a denoising forward."})
    chunk_size: int = field(default=32, metadata={"help": "Views a training forward."})
    reference: str = field(default="auto", metadata={"help": "auto, adapter_off, frozen_copy or none."})
    log_rollouts_every: int = field(default=10, metadata={"help": "Batches between stored rollouts (0: never)."})
    eval_problems: int = field(default=512, metadata={"help": "Held-out problems an evaluation."})
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of evaluation; None: temperature."}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "Complete checkpoints kept on disk."})

    def __post_init__(self) -> None:
        """Validate our own fields; TrainingArguments validates its."""
        if self.per_device_train_batch_size not in (1, 8) or self.gradient_accumulation_steps != 1:
            raise RecipeError(
                "UnmaskConfig: per_device_train_batch_size and gradient_accumulation_steps do not apply; set "
                "num_prompts, num_generations and chunk_size."
            )
        self.per_device_train_batch_size = 1
        for name in ("num_prompts", "num_generations", "num_iterations", "max_completion_length", "chunk_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"UnmaskConfig.{name}: {getattr(self, name)} must be at least 1.")
        if self.temperature <= 0:
            raise RecipeError(f"UnmaskConfig.temperature: {self.temperature} must be above 0; argmax has no gradient.")
        self.remove_unused_columns = False
        self.dataloader_pin_memory = False
        self.ignore_data_skip = False
        super().__post_init__()

    @classmethod
    def from_grpo(cls, config: Any, **overrides: Any) -> UnmaskConfig:
        """Return the UnmaskConfig that means what a `trl.GRPOConfig` says.

        Fields of TrainingArguments and the shared GRPO names carry over; the batch becomes
        `num_prompts = generation_batch_size / num_generations`. Raises RecipeError naming every GRPO field that was set
        away from its default and has no counterpart here, so that nothing is ignored silently.
        """
        defaults = type(config)(output_dir=config.output_dir, report_to=config.report_to)
        own = {f.name for f in fields(cls)}
        base = {f.name for f in fields(TrainingArguments) if f.init}
        mapped = base | own | set(DERIVED)
        batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
        unsupported = [
            f.name
            for f in fields(config)
            if f.init and f.name not in mapped and getattr(config, f.name) != getattr(defaults, f.name)
        ]
        if unsupported:
            raise RecipeError(
                f"from_grpo: {', '.join(sorted(unsupported))} set away from the default and without a counterpart; "
                "unset them, or choose the recipe's parts instead (unmask parts)."
            )
        # Fields whose defaults GRPOConfig itself moves carry over only when the user set them.
        values = {
            name: getattr(config, name)
            for name in base - set(batch)
            if getattr(config, name) != getattr(defaults, name) or name in ("output_dir", "report_to", "learning_rate")
        }
        values |= {name: getattr(config, name) for name in SAME_NAMES if hasattr(config, name)}
        if getattr(config, "reward_weights", None) is not None:
            values["reward_weights"] = list(config.reward_weights)
        values["num_prompts"] = max(1, config.generation_batch_size // config.num_generations)
        return cls(**(values | overrides))
