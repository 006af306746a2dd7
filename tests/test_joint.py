"""Joint training: both gradients by enumeration, credit with and without speed, and runs end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import shortrun
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.policies.planner import PlannerSpec, fingerprint_of, load_planner, new_planner, read_planner
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import run
from unmask.rl.advantages import group_mean
from unmask.rl.checkpoints import load_plan, plan_path, save_plan
from unmask.rl.credit import Credit
from unmask.rl.joint import Joint, JointCredit, JointPlan, credit_batch
from unmask.rl.objective import build_objective
from unmask.rl.planning import Planning
from unmask.rl.speed import multiplicative
from unmask.rl.surrogates import importance
from unmask.rl.targets import open_target
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import SAMPLED, Trajectory

PROMPT, TEMPERATURE, ALPHA, CONSTANT = torch.tensor([1, 3]), 0.7, 1.5, 0.2
# What a canvas alone decides: with these the enumeration needs no history.
FEATURES = ("odds", "margin", "masked", "time", "left")
SECTION = {
    "schedule": {"name": "whole", "per_step": 1},
    "score": "planner",
    "selection": "planned",
    "eos": {"rule": "none"},
}


@dataclass
class Step:
    """What one step could do: features, candidates, what it opened, and both log-probabilities."""

    feature_LF: Tensor
    candidate_L: Tensor
    tokens: dict[int, int]
    choice: Tensor
    logprobs: dict[int, Tensor]


def outcomes(toys: ModuleType, toy: Any, weight_F: Tensor, bias: Tensor, canvas: tuple[int, ...], t: int) -> list[Step]:
    """Return all that a step at time `t` can do: sets of positions with the sampled fallback, times their tokens."""
    logits_LV = toy.logits(torch.cat([PROMPT, torch.tensor(canvas)])[None])[0, -toys.L :, : toys.V]
    p_LV, logq_LV = logits_LV.softmax(-1), (logits_LV / TEMPERATURE).log_softmax(-1)
    free = [i for i in range(toys.L) if canvas[i] == toys.MASK]
    first_L, second_L = p_LV.topk(2, dim=1).values.unbind(dim=1)
    open_L = torch.tensor([i in free for i in range(toys.L)])
    odds_L = (first_L.log() - (1 - first_L).log()).clamp(-12, 12) / 4
    time_L, left_L = torch.full((2, toys.L), t / toys.L), torch.full((toys.L,), len(free) / toys.L)
    columns = [torch.where(open_L, odds_L, 0), torch.where(open_L, first_L - second_L, 0), open_L, time_L[0], left_L]
    feature_LF = torch.stack([column.half() for column in columns], dim=1)
    z_L = feature_LF.double() @ weight_F + bias
    s_L, idle = z_L.sigmoid(), torch.stack([1 - z_L[i].sigmoid() for i in free]).prod()
    found = []
    for size in range(1, len(free) + 1):
        for chosen in itertools.combinations(free, size):
            chance = torch.stack([s_L[i] if i in chosen else 1 - s_L[i] for i in free]).prod()
            if size == 1:
                chance = chance + idle * z_L[free].softmax(0)[free.index(chosen[0])]
            for draw in itertools.product(range(toys.V), repeat=size):
                tokens = dict(zip(chosen, draw, strict=True))
                logprobs = {i: logq_LV[i, v] for i, v in tokens.items()}
                found.append(Step(feature_LF, open_L, tokens, chance.log(), logprobs))
    return found


def paths_of(toys: ModuleType, toy: Any, weight_F: Tensor, bias: Tensor) -> list[list[Step]]:
    """Return every trajectory from the blank canvas."""

    def grown(canvas: tuple[int, ...], t: int) -> Iterator[list[Step]]:
        if toys.MASK not in canvas:
            yield []
            return
        for step in outcomes(toys, toy, weight_F, bias, canvas, t):
            after = tuple(step.tokens.get(i, token) for i, token in enumerate(canvas))
            for rest in grown(after, t + 1):
                yield [step, *rest]

    return list(grown((toys.MASK,) * toys.L, 0))


def log_probability(path: list[Step]) -> Tensor:
    return torch.stack([step.choice + sum(step.logprobs.values()) for step in path]).sum()


def record(toys: ModuleType, paths: list[list[Step]]) -> Trajectory:
    """Return the trajectory that a recorder would have made of `paths`, one a row."""
    rows, steps = len(paths), max(map(len, paths))
    born_BL = torch.zeros(rows, toys.L, dtype=torch.int16)
    tokens_BL, logprob_BL = torch.zeros(rows, toys.L, dtype=torch.long), torch.zeros(rows, toys.L, dtype=torch.float64)
    choice_BS = torch.zeros(rows, steps)
    features_BSLF = torch.zeros(rows, steps, toys.L, len(FEATURES), dtype=torch.float16)
    candidate_BSL = torch.zeros(rows, steps, toys.L, dtype=torch.bool)
    for b, path in enumerate(paths):
        for t, step in enumerate(path):
            features_BSLF[b, t], candidate_BSL[b, t] = step.feature_LF.detach(), step.candidate_L
            choice_BS[b, t] = step.choice.detach()
            for i, token in step.tokens.items():
                born_BL[b, i], tokens_BL[b, i], logprob_BL[b, i] = t, token, step.logprobs[i].detach()
    return Trajectory(
        prompt_BQ=PROMPT.expand(rows, -1),
        prompt_mask_BQ=torch.ones(rows, len(PROMPT), dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=torch.full((rows, toys.L), SAMPLED, dtype=torch.int8),
        born_BL=born_BL,
        rank_BL=torch.zeros_like(born_BL),
        logprob_BL=logprob_BL,
        steps_B=torch.tensor([len(path) for path in paths]),
        rollout_id_B=torch.arange(rows),
        temperature=TEMPERATURE,
        mask_token_id=toys.MASK,
        eos_token_ids=(toys.EOS,),
        banned_token_ids=(toys.MASK,),
        choice_logprob_BS=choice_BS,
        features_BSLF=features_BSLF,
        candidate_BSL=candidate_BSL,
    )


def joint_of(seed: int) -> Joint:
    """Return a joint objective whose planner weighs its features at random."""
    made = new_planner(PlannerSpec(features=FEATURES, network="linear", bias=-0.5))
    made.network.output.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    planning = Planning(made, importance, multiplicative, group=1, alpha=(ALPHA, ALPHA))
    parts = {"unit": "token", "surrogate": "importance", "weight": "uniform", "chunk": 50}
    return Joint(build_objective({"estimator": {"name": "trace", "tokens": "all"}, **parts}), planning)


def leaves_of(joint: Joint) -> tuple[Tensor, Tensor]:
    output = joint.planning.planner.network.output
    return output.weight[0].detach().double().requires_grad_(), output.bias[0].detach().double().requires_grad_()


def rewards_of(toys: ModuleType, tokens_BL: Tensor) -> Tensor:
    table = torch.rand(toys.V**toys.L, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return table[(tokens_BL * toys.V ** torch.arange(toys.L)).sum(dim=1)]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_both_gradients_are_those_of_the_expected_rewards(toys: ModuleType, seed: int) -> None:
    """Of every trajectory once, its advantage times its probability: the planner's with speed, the denoiser's without.

    The denoiser's is exact for features that are data, and the path through them, which is left out, is no trifle.
    """
    toy, joint = toys.Toy(seed), joint_of(seed)
    weight_F, bias = leaves_of(joint)
    paths = paths_of(toys, toy, weight_F, bias)
    log_B = torch.stack([log_probability(path) for path in paths])
    assert log_B.exp().sum().item() == pytest.approx(1, abs=1e-12)
    made = record(toys, paths)
    reward_B = rewards_of(toys, made.tokens_BL)
    paid_B = reward_B * ((toys.L - made.steps_B + 1) / toys.L).double() ** ALPHA
    planner_exact = torch.cat(
        [g.view(-1) for g in torch.autograd.grad((log_B.exp() * paid_B).sum(), (weight_F, bias), retain_graph=True)]
    )
    tokens_B = torch.stack([torch.stack([sum(s.logprobs.values()) for s in path]).sum() for path in paths])
    (log_B.detach().exp() * tokens_B * reward_B).sum().backward(retain_graph=True)
    denoiser_exact = toy.gradient()
    (log_B.exp() * reward_B).sum().backward()
    assert error(toy.gradient(), denoiser_exact) > 0.05

    batch: Any = SimpleNamespace(trajectory=made, rewards=SimpleNamespace(total_B=reward_B))
    torch.testing.assert_close(joint.planning.credit(batch, 0), paid_B)
    probability_B = log_B.detach().exp()
    credit = JointCredit(Credit(probability_B * (reward_B - CONSTANT)), Credit(probability_B * (paid_B - CONSTANT)))
    sampler = joint.planning.acting(build_sampler(SECTION, temperature=TEMPERATURE))
    plan = joint.plan(toy, None, made, credit, rng=None, sampler=sampler)
    toy.calls.clear()
    joint.tokens.backward(toy, plan.tokens)
    calls, alone = list(toy.calls), toy.gradient()
    toy.calls.clear()
    statistics = joint.backward(toy, plan)
    assert toy.calls == calls, "the planner's part calls no denoiser"
    found = toy.gradient()
    assert torch.equal(found, alone)
    assert error(-plan.tokens.mass * found, denoiser_exact) < 1e-9
    output = joint.planning.planner.network.output
    gradient = torch.cat([output.weight.grad.view(-1), output.bias.grad]).double()
    assert error(-plan.positions.mass * gradient, planner_exact) < 1e-5
    assert statistics["planner_ratio_max_deviation"] < 1e-5 and statistics["planner_steps"] == made.steps_B.sum()


def test_rollouts_are_of_the_enumerated_process(toys: ModuleType) -> None:
    """20,000 rollouts: frequencies within 4 standard errors, recorded log-probs those of the paths."""
    toy, joint, rows = toys.Toy(0), joint_of(0), 20_000
    paths = paths_of(toys, toy, *leaves_of(joint))
    exact = record(toys, paths)
    sampler = joint.planning.acting(build_sampler(SECTION, temperature=TEMPERATURE))
    prompt_BQ = PROMPT.expand(rows, -1)
    canvas_BL = torch.full((rows, toys.L), toys.MASK)
    made = denoise(toy, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(rows), seed=0)
    made.validate()

    def keys(of: Trajectory) -> list[tuple[int, ...]]:
        return [(*a, *b) for a, b in zip(of.tokens_BL.tolist(), of.born_BL.tolist(), strict=True)]

    index = {key: n for n, key in enumerate(keys(exact))}
    path_B = torch.tensor([index[key] for key in keys(made)])
    expected = torch.stack([log_probability(path) for path in paths]).detach().exp() * rows
    count, large = torch.bincount(path_B, minlength=len(paths)), expected >= 5
    statistic = ((count - expected).square() / expected)[large].sum().item()
    assert statistic <= large.sum() + 4 * (2 * large.sum()) ** 0.5
    torch.testing.assert_close(made.logprob_BL.double(), exact.logprob_BL[path_B], rtol=0, atol=1e-6)
    assert made.features_BSLF is not None and made.choice_logprob_BS is not None
    # fp16 features may be rounded the other way.
    torch.testing.assert_close(made.features_BSLF, exact.features_BSLF[path_B], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(made.choice_logprob_BS, exact.choice_logprob_BS[path_B], rtol=0, atol=5e-3)


@dataclass
class Batch:
    """What crediting reads of a batch."""

    trajectory: Any
    rewards: Any
    group_B: Tensor
    advantage_B: Tensor | None = None

    def with_advantage(self, advantage_B: Tensor) -> Batch:
        return replace(self, advantage_B=advantage_B)


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.steps_B)


def test_speed_is_in_the_planners_credit_alone() -> None:
    """Four rollouts of a group of a canvas of 10: two right ones that differ in calls alone, two wrong ones."""
    joint = joint_of(0)
    rows = Rows(steps_B=torch.tensor([1, 6, 1, 6]), rollout_id_B=torch.arange(4), source_BL=torch.ones(4, 10))
    batch: Any = Batch(rows, SimpleNamespace(total_B=torch.tensor([1.0, 1.0, 0.0, 0.0])), torch.zeros(4).long())
    worker: Any = None
    credited, credit = credit_batch(joint, worker, batch, group_mean, 0)
    assert isinstance(credit, JointCredit)
    torch.testing.assert_close(credit.tokens.value, torch.tensor([0.5, 0.5, -0.5, -0.5]))
    paid = [1.0, 0.5**ALPHA]
    wanted = torch.tensor([*paid, 0.0, 0.0]) - sum(paid) / 4
    torch.testing.assert_close(credit.positions.value, wanted)
    assert torch.equal(credited.advantage_B, credit.tokens.value)
    # Either half alone is credited as it always was.
    _, plain = credit_batch(joint.tokens, worker, batch, group_mean, 0)
    _, fast = credit_batch(joint.planning, worker, batch, group_mean, 0)
    assert torch.equal(plain.value, credit.tokens.value) and torch.equal(fast.value, credit.positions.value)


RECIPE = shortrun.RECIPE.replace("name: short", "name: both")
RECIPE = RECIPE.replace("score: confidence, selection: top", "score: planner, selection: planned")
RECIPE = RECIPE.replace("method: cj_grpo\nobjective: {inner_steps: 2, beta: 0.0}", "method: joint")
RECIPE += "planner: {width: 16, mlp: 32, lr: 3.0e-3, alpha: [0.5, 2.0], expert: {levels: [0.5], warmup: 1}}\n"


def recipe(model: Path, *overrides: str) -> Any:
    return parse_recipe(RECIPE.replace("MODEL", str(model)), overrides)


@pytest.mark.usefixtures("place")
def test_a_run_trains_both_and_both_are_used(model: Path) -> None:
    changes = ("run.save_every=1", "run.keep=9", "optim.max_grad_norm=0.01")
    summary = run.train(recipe(model, *changes))
    folder = Path(summary["folder"])
    records = [record for record in shortrun.lines(folder / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    # The first update after the warm-up: what was drawn has the probability that it had.
    assert records[2]["train/planner_ratio_max_deviation"] < 1e-5 and records[2]["train/ratio_max_deviation"] < 1e-4
    assert all(record["grad_norm"] > 0 and record["train/planner_grad_norm"] > 0 for record in records[:3])
    planner = load_planner(folder)
    start = new_planner(planner.spec, seed=0).network.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in planner.network.state_dict().items())
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    # Learning rates are their own, in the one file that resumes both optimizers.
    members = torch.load(folder / "checkpoint-3" / "optimizer.pt", weights_only=True)["members"]
    assert [member["param_groups"][0]["lr"] for member in members] == [1e-2, 3e-3]
    # The run, and each of its checkpoints, is evaluated with both.
    assert run.evaluate(str(folder))["nfe"] == pytest.approx(summary["after"]["nfe"])
    opened, denoiser = open_target(str(folder / "checkpoint-2"))
    place = Path(opened.rollout.sampler.score["path"])
    assert place == folder / "checkpoint-2" / "planner" and load_planner(place).fingerprint == planner.fingerprint
    held = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    state = denoiser.model.state_dict()
    for name, value in held.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], value), name


@pytest.mark.usefixtures("place")
def test_all_weights_are_trained_and_the_planner_knows_them(model: Path) -> None:
    summary = run.train(recipe(model, "model.lora=null", "optim.lr=1e-2", "optim.steps=2"))
    folder = Path(summary["folder"])
    opened, denoiser = open_target(str(folder))
    assert opened.rollout.sampler.score["path"] == str(folder / "planner")
    base = load_file(model / "model.safetensors")
    trained = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(trained[name], value) for name, value in base.items())
    assert load_planner(folder).fingerprint == fingerprint_of(denoiser)


@pytest.mark.usefixtures("place")
def test_a_plan_survives_its_checkpoint(model: Path, tmp_path: Path) -> None:
    """The plan of both parts is read as it was written, and the trade-off of dual ascent with it."""
    changes = ("planner.alpha=1.0", "planner.target_nfe=5.0", "run.save_every=1", "optim.steps=3", "run.keep=9")
    summary = run.train(recipe(model, *changes))
    folder = Path(summary["folder"])
    plan = load_plan(plan_path(folder / "checkpoint-3", 0), build_sampler(SECTION))
    assert isinstance(plan, JointPlan) and plan.positions.mass > 0 and len(plan.tokens.views)
    save_plan(tmp_path / "again.safetensors", plan)
    again = load_plan(tmp_path / "again.safetensors", build_sampler(SECTION))
    assert isinstance(again, JointPlan)
    for name, value in plan.tensors().items():
        assert torch.equal(again.tensors()[name], value), name
    files = [folder / f"checkpoint-{n}" / "planner" / "planner.safetensors" for n in (1, 3)]
    prices = [read_planner(file)[0]["notes"]["price"] for file in files]
    # It moves after the warm-up.
    assert prices[0] == 1.0 and prices[1] != 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["planner=null"], "add a `planner` section"),
        (["rollout.temperature=0.0"], "decodes greedily"),
        (["model.sharding=fsdp"], "set it to none"),
        (["objective.advantage=step_difference"], "a planner is paid for rollouts"),
        (["rollout.sampler.selection={name: planned, decide: mode}"], "learns from what it draws"),
        (["objective.actions=[positions]"], "train both"),
        (["objective.actions=[positions]", "model.lora=null"], "planner.lr: 0.003"),
        (["objective.actions=[tokens]"], "nothing trains it"),
    ],
)
def test_recipes_that_contradict_themselves(model: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(model, *changes)
