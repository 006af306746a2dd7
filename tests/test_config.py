"""UnmaskConfig: TRL's names carry over, and nothing that would have no effect is taken silently."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from unmask.recipes.registry import RecipeError
from unmask.rl.config import BATCH_NAMES, SAME_NAMES, WITHOUT_EFFECT, UnmaskConfig

BASE = {f.name for f in fields(TrainingArguments)}
UNSUPPORTED = sorted(
    f.name for f in fields(GRPOConfig) if f.init and f.name not in BASE | set(SAME_NAMES) | set(BATCH_NAMES)
)


def grpo(folder: Path, **values: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **values)


def plain_grpo(folder: Path, **values: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, **values)


def another(value: Any) -> Any:
    """Return a value that differs from `value` and has its type, as far as there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else ["set"] if isinstance(value, list) else {"set": True}


def test_the_defaults_pass(tmp_path: Path) -> None:
    config = UnmaskConfig.from_grpo(plain_grpo(tmp_path))
    assert config.num_generations == 8 and config.num_prompts == 1
    assert config.output_dir == str(tmp_path) and config.learning_rate == 1e-6 and config.beta == 0.0
    assert config.per_device_train_batch_size == 1 and not config.bf16


def test_names_carry_over(tmp_path: Path) -> None:
    config = UnmaskConfig.from_grpo(
        plain_grpo(
            tmp_path,
            num_generations=4,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            num_iterations=3,
            max_completion_length=48,
            temperature=0.7,
            beta=0.02,
            epsilon=0.1,
            epsilon_high=0.3,
            reward_weights=[1.0, 0.5],
            learning_rate=3e-5,
            max_steps=11,
            warmup_steps=2,
            weight_decay=0.1,
            max_grad_norm=0.4,
            seed=7,
            save_steps=5,
            save_total_limit=4,
            logging_steps=3,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
        ),
        chunk_size=9,
    )
    assert (config.num_prompts, config.num_generations, config.num_iterations) == (3, 4, 3)
    assert (config.max_completion_length, config.temperature, config.beta) == (48, 0.7, 0.02)
    assert (config.epsilon, config.epsilon_high, config.reward_weights) == (0.1, 0.3, [1.0, 0.5])
    assert (config.learning_rate, config.max_steps, config.warmup_steps) == (3e-5, 11, 2)
    assert (config.weight_decay, config.max_grad_norm, config.seed, config.save_steps) == (0.1, 0.4, 7, 5)
    assert (config.keep_checkpoints, config.save_total_limit, config.logging_steps) == (4, None, 3)
    assert (config.adam_beta2, config.lr_scheduler_type, config.chunk_size) == (0.95, "cosine", 9)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_without_a_counterpart_is_refused(tmp_path: Path, name: str) -> None:
    config = plain_grpo(tmp_path)
    # Set afterwards: GRPOConfig itself would refuse some combinations.
    setattr(config, name, another(getattr(config, name)))
    with pytest.raises(RecipeError, match=f"from_grpo: {name} set away from the default") as caught:
        UnmaskConfig.from_grpo(config)
    assert "unset them" in str(caught.value) and "\n" not in str(caught.value)


def test_every_refused_field_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"from_grpo: loss_type, top_k, top_p set away"):
        UnmaskConfig.from_grpo(plain_grpo(tmp_path, top_p=0.9, top_k=20, loss_type="dr_grpo"))


def test_the_refused_fields_are_what_grpo_has_and_we_have_not() -> None:
    assert {"use_vllm", "loss_type", "scale_rewards", "top_p", "importance_sampling_level"} <= set(UNSUPPORTED)
    assert not set(UNSUPPORTED) & {f.name for f in fields(UnmaskConfig)}


def test_a_batch_shared_among_optimizer_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="steps_per_generation 4 shares a batch among several optimizer steps"):
        UnmaskConfig.from_grpo(plain_grpo(tmp_path, steps_per_generation=4))


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_a_training_argument_without_effect_is_refused(tmp_path: Path, name: str) -> None:
    (default,) = (f.default for f in fields(UnmaskConfig) if f.name == name)
    value = 4 if name == "per_device_train_batch_size" else another(default)
    with pytest.raises(RecipeError, match=rf"UnmaskConfig\.{name}: .* has no effect here; ") as caught:
        UnmaskConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    assert "\n" not in str(caught.value)


def test_what_a_user_sets_through_grpo_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"UnmaskConfig.adam_epsilon: 0.001 has no effect here"):
        UnmaskConfig.from_grpo(plain_grpo(tmp_path, adam_epsilon=1e-3))
    # GRPOConfig turns bf16 on by itself; turned off by hand it is what UnmaskConfig has anyway.
    assert not UnmaskConfig.from_grpo(grpo(tmp_path)).bf16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_prompts", 0),
        ("num_generations", 0),
        ("num_iterations", -1),
        ("max_prompt_length", 0),
        ("max_completion_length", 0),
        ("rollout_batch_size", 0),
        ("chunk_size", 0),
        ("eval_problems", 0),
        ("keep_checkpoints", 0),
        ("save_total_limit", 0),
        ("temperature", -0.5),
    ],
)
def test_ranges(tmp_path: Path, name: str, value: float) -> None:
    named = "keep_checkpoints" if name == "save_total_limit" else name
    with pytest.raises(RecipeError, match=rf"UnmaskConfig.{named}: {value} must be at least [01]"):
        UnmaskConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_a_copy_of_a_config_is_a_config(tmp_path: Path) -> None:
    config = UnmaskConfig(output_dir=str(tmp_path), use_cpu=True, save_total_limit=1)
    copy = dataclasses.replace(config, num_prompts=5)
    assert (copy.num_prompts, copy.keep_checkpoints, copy.logging_steps) == (5, 1, 1)
