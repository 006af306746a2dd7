"""UnmaskTrainer as a user of TRL writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
import toyrewards
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from unmask import UnmaskConfig, UnmaskTrainer, build_objective, build_sampler, load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.registry import SLOTS
from unmask.rl.advantages import leave_one_out
from unmask.rl.checkpoints import CheckpointReadError
from unmask.rl.defaults import CJ_GRPO
from unmask.rl.losses import NonFiniteError

ROWS = [{"prompt": f"{a} + {b}", "answer": str(a + b)} for a in range(4) for b in range(3)]


def config(folder: Path, **values: Any) -> UnmaskConfig:
    small = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "num_prompts": 2,
        "num_generations": 4,
        "max_completion_length": 16,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    return UnmaskConfig(**(small | values))


def trainer(path: Path, folder: Path, **changes: Any) -> UnmaskTrainer:
    ours = set(UnmaskConfig.__dataclass_fields__) - {"optim"}  # UnmaskTrainer has an argument of that name
    values = {key: changes.pop(key) for key in list(changes) if key in ours}
    arguments: dict[str, Any] = {
        "model": str(path),
        "reward_funcs": toyrewards.mean_id,
        "args": config(folder, **values),
        "train_dataset": ROWS,
        "peft_config": LoraConfig(r=2),
    }
    return UnmaskTrainer(**(arguments | changes))


def updates(folder: Path) -> list[dict[str, Any]]:
    return [record for record in shortrun.lines(folder / "metrics.jsonl") if "loss" in record]


def test_it_trains_as_trl_does(model: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def length(prompts: list, completions: list, answer: list, trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append({"prompts": prompts, "answer": answer, "step": trainer_state.global_step, "rest": kwargs})
        return [float(len(text)) for text in completions]

    rows = Dataset.from_list([{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS])
    run = UnmaskTrainer(
        model=str(model),
        reward_funcs=[length, toyrewards.later],
        args=config(tmp_path, reward_weights=[0.0, 2.0], eval_strategy="steps", eval_steps=1, eval_problems=3),
        train_dataset=rows,
        eval_dataset=Dataset.from_list(ROWS[:5]),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    before = {name: value.detach().clone() for name, value in run.denoiser.model.named_parameters()}
    output = run.train()
    assert output.global_step == 2
    moved = {name for name, value in run.denoiser.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in moved)
    training = [call for call in seen if len(call["prompts"]) == 8]
    assert [call["step"] for call in training] == [0, 1]
    assert training[0]["prompts"][0][0]["role"] == "user" and {"log_metric", "log_extra", "completion_ids"} <= set(
        training[0]["rest"]
    )
    answers = {row["prompt"]: row["answer"] for row in ROWS}
    assert [answers[prompt[0]["content"]] for prompt in training[0]["prompts"]] == training[0]["answer"]
    records = shortrun.lines(tmp_path / "metrics.jsonl")
    first = updates(tmp_path)[0]
    assert first["reward/total"] == pytest.approx(2 * first["reward/later"]) and first["reward/length"] > 0
    assert [record["eval/n"] for record in records if "eval/n" in record] == [3, 3]


def test_the_rollouts_of_conversations_are_messages(model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: list, **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(said[0]["content"])) for said in completions]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    trainer(model, tmp_path, reward_funcs=reward, train_dataset=rows, max_steps=1).train()
    assert seen[0][0]["role"] == "assistant"


def test_epochs_count_the_dataset(model: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        seen.extend(prompts[::4])
        return [0.0] * len(prompts)

    length = {"max_steps": -1, "num_train_epochs": 1.5, "num_iterations": 2, "num_prompts": 4}
    run = trainer(model, tmp_path, reward_funcs=reward, **length)
    # 12 rows in batches of 4 for one and a half epochs, each batch used twice.
    assert run.args.max_steps == 10
    run.train()
    assert len(seen) == 20 and set(seen[:12]) == {row["prompt"] for row in ROWS}


def test_defaults_are_the_cj_grpo_row(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, beta=0.1, epsilon=0.15, chunk_size=7, temperature=0.9, max_completion_length=40)
    assert (run.objective.beta, run.objective.chunk, run.objective.unit) == (0.1, 7, SLOTS["unit"].get("token"))
    assert run.objective.surrogate.keywords == {"low": 0.15, "high": 0.15}
    assert run.sampler.temperature == 0.9 and run.reference is not None
    run.train()
    # Forty positions in blocks of eight (the largest divisor of 32 that fits), two a step.
    assert updates(tmp_path)[0]["rollout/nfe"] <= 20


def test_own_sampler_objective_advantage_and_optimizer(model: Path, tmp_path: Path) -> None:
    section = {**CJ_GRPO, "unit": "step", "surrogate": "importance"}
    run = trainer(
        model,
        tmp_path,
        sampler=build_sampler({"schedule": {"name": "uniform", "steps": 4}, "eos": {"rule": "none"}}),
        objective=build_objective(section),
        advantage=leave_one_out,
        optim={"name": "muon", "matrix_lr": 1e-2},
        peft_config=None,
        eval_dataset=ROWS[:2],
    )
    run.train()
    assert {type(o).__name__ for o in run.optimizer.optimizer.members} == {"Muon", "AdamW"}
    assert updates(tmp_path)[0]["rollout/nfe"] == 4.0
    assert run.evaluate()["eval_nfe"] == 4.0 and run.evaluate(ROWS[:1], metric_key_prefix="own")["own_n"] == 1


def test_activation_checkpointing_changes_memory_only(model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "plain", tmp_path / "checkpointed"]
    pairs = zip(folders, (False, True), strict=True)
    runs = [trainer(model, folder, activation_checkpointing=on) for folder, on in pairs]
    for run in runs:
        run.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in runs[1].denoiser.model.modules())
    for a, b in zip(*(run.denoiser.model.parameters() for run in runs), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_frozen_copy_as_reference(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, peft_config=None, beta=0.5, num_iterations=2, learning_rate=1e-3)
    start = {name: value.clone() for name, value in run.reference.model.state_dict().items()}
    run.train()
    assert all(torch.equal(start[name], value) for name, value in run.reference.model.state_dict().items())
    first, second = updates(tmp_path)
    assert first["train/kl"] == pytest.approx(0.0, abs=1e-9) and second["train/kl"] > 1e-6


def test_lora_adapts_the_familys_layers_by_default(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path)
    trained = {name.split(".")[-4] for name, p in run.denoiser.model.named_parameters() if p.requires_grad}
    assert trained == set(load_denoiser(str(model)).family.lora_targets)


def test_saving_and_loading_again(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path / "run", peft_config=None, learning_rate=1e-3)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = load_denoiser(str(tmp_path / "saved"))
    for a, b in zip(run.denoiser.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    adapted = trainer(model, tmp_path / "other")
    adapted.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_from_python(model: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "num_iterations": 2, "save_total_limit": 2}
    whole = trainer(model, tmp_path / "whole", **saving)
    whole.train()
    assert shortrun.checkpoints(tmp_path / "whole") == ["checkpoint-4", "checkpoint-5"]
    trainer(model, tmp_path / "cut", callbacks=[Stop()], **saving).train()
    with pytest.raises(CheckpointReadError, match="holds checkpoint-3 of an earlier run; call train"):
        trainer(model, tmp_path / "cut", **saving).train()
    resumed = trainer(model, tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(*(run.denoiser.model.parameters() for run in (whole, resumed)), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_bar_does_not_outlive_an_error(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, reward_funcs=toyrewards.broken)
    with pytest.raises(ValueError, match="division by zero"):
        run.train()
    assert run.progress.bar is None


def test_a_gradient_that_is_not_finite_is_not_stepped(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    weight = next(p for p in run.denoiser.model.parameters() if p.requires_grad)
    weight.register_hook(lambda grad: torch.full_like(grad, torch.inf) if run.state.global_step == 2 else grad)
    with pytest.raises(NonFiniteError, match=r"update 3: the norm of the gradient is (nan|inf); nothing was stepped"):
        run.train()
    assert all(p.isfinite().all() for p in run.denoiser.model.parameters())
    assert shortrun.checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def refuse(match: str, path: Path, folder: Path, **changes: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        trainer(path, folder, **changes)
    assert "\n" not in str(caught.value)


def test_what_the_constructor_refuses(model: Path, tmp_path: Path) -> None:
    refuse("train_dataset: the dataset is empty", model, tmp_path, train_dataset=[])
    refuse("eval_dataset: the dataset is empty", model, tmp_path, eval_dataset=Dataset.from_list([]))
    refuse("rows need a column 'prompt'; there are question", model, tmp_path, train_dataset=[{"question": "1"}])
    refuse("eval_dataset: dict is no sequence of rows", model, tmp_path, eval_dataset={"a": ROWS})
    refuse("train_dataset: generator is no sequence", model, tmp_path, train_dataset=(row for row in ROWS))
    refuse("reward_weights: 2 weights for 1 rewards", model, tmp_path, reward_weights=[1.0, 2.0])
    refuse("1 rollout has no group for advantage 'group_mean'", model, tmp_path, num_generations=1)
    refuse("needs the column 'solution', which", model, tmp_path, reward_funcs=toyrewards.needs_solution)
    refuse("model: Linear is no denoiser", model, tmp_path, model=torch.nn.Linear(1, 1))
    refuse("'qproj' matches no linear layer", model, tmp_path, peft_config=LoraConfig(r=2, target_modules=["qproj"]))
    endless = shortrun.recipe_rows()
    refuse("max_steps: -1, but the task has rows without end", model, tmp_path, train_dataset=endless, max_steps=-1)
