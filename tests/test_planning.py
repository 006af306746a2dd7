"""Training a planner: the loss from recorded steps alone, its gradient, experts, speed, and a run end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.policies.planner import PlannerSpec, new_planner
from unmask.policies.planner_distributions import Categorical
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import orders
from unmask.rl.losses import RatioError
from unmask.rl.planning import Planning
from unmask.rl.speed import additive, multiplicative
from unmask.rl.surrogates import importance, ppo_clip
from unmask.rl.targets import open_target
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

CANVAS, GROUP, ROWS = 12, 4, 12
SECTION = {"schedule": {"name": "whole", "per_step": 1}, "score": "planner", "selection": "planned"}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    made = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64, seed=1)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(20)
    return made


def planning_of(surrogate: Any = None, spec: PlannerSpec | None = None, **more: Any) -> Planning:
    spec = spec or PlannerSpec(width=16, mlp=32)
    made = new_planner(spec, seed=2)
    surrogate = surrogate or partial(ppo_clip, low=0.5, high=0.5)
    return Planning(made, surrogate, multiplicative, **{"group": GROUP, "seed": 7, **more})


def roll(denoiser: Denoiser, planning: Planning, *, step: int = 3, **score: Any) -> tuple[Trajectory, Any]:
    section = {**SECTION, "score": {"name": "planner", **score}}
    sampler = planning.acting(build_sampler(section, temperature=0.0))
    prompt_BQ = torch.arange(ROWS)[:, None] // GROUP + 40
    canvas_BL = torch.full((ROWS, CANVAS), denoiser.family.mask_token_id)
    ids = torch.arange(ROWS)
    planning.batch = step
    return denoise(denoiser, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, ids, seed=7, step=step), sampler


def advantages(seed: int = 0) -> Tensor:
    value_B = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
    return value_B - value_B.view(-1, GROUP).mean(dim=1).repeat_interleave(GROUP)


def gradient(planning: Planning) -> Tensor:
    parameters = [p for p in planning.learner.parameters()]
    vector = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    planning.learner.zero_grad()
    return vector


def planned(planning: Planning, made: Trajectory, sampler: Any, advantage_B: Tensor | None = None) -> Any:
    advantage_B = advantages() if advantage_B is None else advantage_B
    # Neither a denoiser nor a reference is there to be called.
    return planning.plan(None, None, made, advantage_B, rng=None, sampler=sampler)


def logprobs(planning: Planning, made: Trajectory, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (row, log p) of every recorded step, one at a time."""
    rows, values = [], []
    for row in range(ROWS):
        for step in range(int(made.steps_B[row])):
            index = torch.tensor([row]), torch.tensor([step])
            token_1L, rank_1L = made.drawn_at(*index)
            distribution = planning.planner.distribution(
                made.features_BSLF[index].float(), made.candidate_BSL[index], temperature=temperature
            )
            rows.append(row)
            values.append(distribution.log_prob(token_1L != made.mask_token_id, rank_1L))
    return torch.tensor(rows), torch.cat(values)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_gradient_is_the_policy_gradient(denoiser: Denoiser, temperature: float) -> None:
    """At ratio 1 it is that of -1/N sum A log p, over steps that are scored one by one."""
    planning = planning_of()
    made, sampler = roll(denoiser, planning, temperature=temperature)
    plan = planned(planning, made, sampler)
    statistics = planning.backward(None, plan)
    assert statistics["ratio_max_deviation"] < 1e-5 and plan.mass == made.steps_B.sum()
    found = gradient(planning)
    row_N, logprob_N = logprobs(planning, made, temperature)
    (-(advantages()[row_N] * logprob_N).sum() / len(row_N)).backward()
    torch.testing.assert_close(found, gradient(planning), rtol=1e-4, atol=1e-7)
    assert found.norm() > 1e-3


def test_chunks_change_nothing(denoiser: Denoiser) -> None:
    found = []
    for chunk in (1, 5, 10_000):
        planning = planning_of(chunk=chunk, entropy=0.01)
        made, sampler = roll(denoiser, planning)
        loss = planning.backward(None, planned(planning, made, sampler))["loss"]
        found.append((loss, gradient(planning)))
    for loss, vector in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(vector, found[0][1], rtol=1e-4, atol=1e-7)


def test_a_ratio_beyond_the_limit_is_an_error(denoiser: Denoiser) -> None:
    planning = planning_of()
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler)
    old_N = plan.old_N.clone()
    old_N[5] -= 3.0
    plan = replace(plan, old_N=old_N)
    ratio = planning.backward(None, plan)["ratio_max_deviation"] + 1
    assert ratio == pytest.approx(math.exp(3.0), rel=1e-4)
    planning.ratio_limit = 0.99 * ratio
    rollout = int(made.rollout_id_B[plan.row_N[5]])
    with pytest.raises(RatioError, match=rf"rollout {rollout}: an importance ratio is 20\.1, "):
        planning.backward(None, plan)


def test_equal_rewards_teach_nothing(denoiser: Denoiser) -> None:
    planning = planning_of()
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler, torch.zeros(ROWS))
    assert len(plan.row_N) == 0 and plan.mass > 0
    planning.backward(None, plan)
    assert gradient(planning).norm() == 0
    missing = planned(planning, made, sampler, torch.full((ROWS,), torch.nan))
    assert missing.mass == 0


def test_a_plan_survives_its_tensors(denoiser: Denoiser) -> None:
    planning = planning_of()
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler)
    again = type(plan).from_tensors(made, sampler, plan.tensors())
    assert planning.backward(None, again) == planning.backward(None, plan)


def test_imitation_is_the_likelihood_of_the_expert(denoiser: Denoiser) -> None:
    planning = planning_of(levels=(0.3, 0.9), block=4, warmup=5)
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler, torch.zeros(ROWS))
    statistics = planning.backward(None, plan)
    _, logprob_N = logprobs(planning, made)
    assert statistics["loss"] == pytest.approx(-logprob_N.mean().item(), rel=1e-5)
    # Levels go round in a group, and rule what is opened.
    assert (made.steps_B.view(-1, 2)[:, 0] <= made.steps_B.view(-1, 2)[:, 1]).all()


def test_cloning_takes_the_good_expert_and_the_others_stay_plain(denoiser: Denoiser) -> None:
    planning = planning_of(importance, levels=(0.3,), warmup=1, steering="cloning", weight=0.5, anneal=8)
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler)
    planning.backward(None, plan)
    found = gradient(planning)
    row_N, logprob_N = logprobs(planning, made)
    expert_N, advantage_N = row_N % GROUP == GROUP - 1, advantages()[row_N]
    own = -(advantage_N * logprob_N)[~expert_N].sum() / (~expert_N).sum()
    # Batch 3 is the second after the warm-up of 1, of 8 over which 0.5 falls.
    cloned = -(advantage_N.clamp(min=0) * logprob_N)[expert_N].sum() / expert_N.sum()
    (own + 0.5 * (1 - 2 / 8) * cloned).backward()
    torch.testing.assert_close(found, gradient(planning), rtol=1e-4, atol=1e-7)


def test_the_published_mixture(denoiser: Denoiser) -> None:
    """Ratios of expert steps are those of (1 - e) p + e, e the experts' share."""
    planning = planning_of(importance, levels=(0.3,), steering="mixture")
    made, sampler = roll(denoiser, planning)
    plan = planned(planning, made, sampler)
    planning.backward(None, plan)
    found = gradient(planning)
    row_N, logprob_N = logprobs(planning, made)
    expert_N, advantage_N = row_N % GROUP == GROUP - 1, advantages()[row_N]
    now_N = torch.where(expert_N, 0.75 * logprob_N.exp() + 0.25, logprob_N.exp())
    (-(advantage_N * now_N / now_N.detach()).sum() / len(row_N)).backward()
    torch.testing.assert_close(found, gradient(planning), rtol=1e-4, atol=1e-7)


def test_alpha_is_one_number_a_group_and_its_law_is_log_uniform() -> None:
    planning = planning_of(alpha=(0.1, 10.0))
    alpha_QG = planning.alphas(torch.arange(4000 * GROUP), 5).view(-1, GROUP)
    assert (alpha_QG == alpha_QG[:, :1]).all()
    share_Q = (alpha_QG[:, 0].double().log10() + 1) / 2
    assert share_Q.min() >= 0 and share_Q.max() <= 1
    assert abs(share_Q.mean().item() - 0.5) < 4 / math.sqrt(12 * 4000)
    assert not torch.equal(planning.alphas(torch.arange(8), 5), planning.alphas(torch.arange(8), 6))


@dataclass
class Rollouts:
    """What `credit` reads of a trajectory."""

    steps_B: Tensor
    rollout_id_B: Tensor
    source_BL: Tensor

    def __len__(self) -> int:
        return len(self.steps_B)


def batch_of(steps: list[int], reward: list[float]) -> Any:
    source_BL = torch.ones(len(steps), 10, dtype=torch.int8)
    made = Rollouts(torch.tensor(steps), torch.arange(len(steps)), source_BL)
    return SimpleNamespace(trajectory=made, rewards=SimpleNamespace(total_B=torch.tensor(reward)))


def test_dual_ascent_follows_the_target() -> None:
    planning = planning_of(target_nfe=5.0, dual_rate=0.5, alpha=(1.0, 1.0))
    planning.credit(batch_of([10, 10, 10, 10], [1.0] * 4), 0)
    assert float(planning.learner.price) == pytest.approx(1 + 0.5 * math.log(2))
    planning.credit(batch_of([1, 1, 1, 1], [1.0] * 4), 1)
    assert float(planning.learner.price) == pytest.approx(1 + 0.5 * math.log(2) - 0.5 * math.log(5))
    planning.credit(batch_of([1, 1, 1, 1], [1.0] * 4), 2)
    assert float(planning.learner.price) == 0.0, "a price below 0 would pay for waiting"
    assert planning.alphas(torch.arange(2), 3).tolist() == [0.0, 0.0]


def test_speed_by_hand() -> None:
    steps_B, length_B, one_B = torch.tensor([1, 5, 10, 40, 3]), torch.full((5,), 10), torch.ones(5)
    reward_B = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = multiplicative(reward_B, steps_B, length_B, 2 * one_B)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.36, 0.01, 0.01, 0.0]))
    assert torch.equal(multiplicative(reward_B, steps_B, length_B, 0 * one_B), reward_B)
    torch.testing.assert_close(
        additive(reward_B, steps_B, length_B, 0.5 * one_B), torch.tensor([0.95, 0.75, 0.5, -1.0, -0.15])
    )


def test_credit_is_told_alpha_and_the_open_positions() -> None:
    planning = planning_of(alpha=(2.0, 2.0))
    batch = batch_of([1, 5], [1.0, 1.0])
    batch.trajectory.source_BL[1, :2] = 2  # given: 8 are open, and 4 of them too many
    torch.testing.assert_close(planning.credit(batch, 0), torch.tensor([1.0, (4 / 8) ** 2]))


def test_orders_by_hand() -> None:
    odds_NL = torch.logit(torch.tensor([[0.9, 0.5, 0.9, 0.99], [0.2, 0.6, 0.4, 0.1]], dtype=torch.float64))
    candidate_NL = torch.tensor([[True, True, True, False], [False, True, False, False]])
    torch.testing.assert_close(
        orders.max_confidence(odds_NL, candidate_NL), torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0]])
    )
    found_NL = orders.softmax(odds_NL, candidate_NL, temperature=0.2)
    torch.testing.assert_close(found_NL[0, 0] / found_NL[0, 1], torch.tensor(math.exp(2)).double())
    torch.testing.assert_close(found_NL.sum(dim=1), torch.ones(2).double())


@pytest.mark.parametrize("name", ["max_confidence", "softmax"])
def test_the_pull_is_least_at_its_order(name: str) -> None:
    """KL at the reference itself is 0, cross-entropy its own entropy; descent from elsewhere comes there."""
    odds_NL, candidate_NL = torch.tensor([[2.0, 1.0, 2.0, 0.3]]), torch.tensor([[True, True, True, False]])
    part = getattr(orders, name)
    reference_NL = part(odds_NL, candidate_NL)
    logit_NL = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logit_NL], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = orders.pull(part, Categorical(logit_NL, candidate_NL), odds_NL, candidate_NL).sum()
        loss.backward()
        optimizer.step()
    least = math.log(2) if name == "max_confidence" else 0.0
    assert loss.item() == pytest.approx(least, abs=2e-3)
    assert (Categorical(logit_NL, candidate_NL).chance_BL.exp() - reference_NL)[candidate_NL].abs().max() < 2e-2


def test_upo_adds_its_pull(denoiser: Denoiser) -> None:
    spec = PlannerSpec(width=16, mlp=32, distribution="categorical")
    losses = []
    for options in ({}, {"order": orders.max_confidence, "pull": 0.5}):
        planning = planning_of(spec=spec, **options)
        made, sampler = roll(denoiser, planning)
        plan = planned(planning, made, sampler)
        losses.append(planning.backward(None, plan)["loss"])
    row_N, step_N = plan.row_N, plan.step_N
    feature_NLF, candidate_NL = made.features_BSLF[row_N, step_N].float(), made.candidate_BSL[row_N, step_N]
    logprob_NL = planning.planner.distribution(feature_NLF, candidate_NL).chance_BL
    best_N = feature_NLF[..., 0].masked_fill(~candidate_NL, -torch.inf)
    ties_NL = best_N == best_N.amax(dim=1, keepdim=True)
    wanted = -torch.stack([logprob_NL[n][ties_NL[n]].mean() for n in range(len(row_N))]).mean()
    assert losses[1] - losses[0] == pytest.approx(0.5 * wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": orders.max_confidence}, "use categorical"),
        ({"alpha": (2.0, 1.0)}, "must rise"),
        ({"alpha": (0.0, 1.0)}, "lie above 0"),
        ({"levels": (1.5,)}, "compared with probabilities"),
        ({"levels": (0.5,) * GROUP, "steering": "cloning"}, "leave the planner none"),
        ({"levels": (0.5,), "spec": PlannerSpec(distribution="count")}, "use bernoulli"),
        ({"target_nfe": 4.0, "alpha": (0.1, 1.0)}, "one number to begin with"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planning_of(**options)


RECIPE = shortrun.RECIPE.replace(", lora: {rank: 2}", "").replace("name: short", "name: order")
RECIPE = RECIPE.replace("score: confidence, selection: top", "score: planner, selection: planned")
RECIPE = RECIPE.replace("method: cj_grpo\nobjective: {inner_steps: 2, beta: 0.0}", "method: unmask_policy")
RECIPE += "planner: {width: 16, mlp: 32, alpha: [0.5, 2.0], expert: {levels: [0.5], warmup: 1, steering: cloning}}\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shortrun.save_model(tmp_path / "model")


def recipe(model: Path, *overrides: str) -> Any:
    return parse_recipe(RECIPE.replace("MODEL", str(model)), overrides)


def test_a_run_trains_saves_resumes_and_is_evaluated(model: Path) -> None:
    # The second inner step of a batch is resumed from its stored plan, features included.
    changes = ("run.save_every=1", "run.keep=9", "rollout.temperature=0.0")
    folder, records, planner = shortrun.planner_run(recipe(model, *changes), resume=3)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["train/ratio_max_deviation"] < 1e-5 and records[2]["train/steps"] > 0
    assert not (folder / "model").exists() and not (folder / "adapter").exists()
    assert planner.spec.width == 16 and planner.fingerprint
    opened, _ = open_target(str(folder))
    assert opened.rollout.sampler.score["path"] == str(folder / "planner")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["planner=null"], "add a `planner` section"),
        (["objective.actions=[tokens]"], "nothing trains it"),
        (["model.lora={rank: 2}"], "leaves the denoiser as it is"),
        (["planner.lr=0.1"], "its learning rate is optim.lr"),
        (["rollout.sampler.selection=top"], "score planner with selection planned"),
        (["rollout.sampler.selection={name: planned, decide: mode}"], "learns from what it draws"),
        (["objective.beta=0.1"], "no reference"),
        (["planner.features=[odd]"], "Did you mean 'odds'"),
        (["planner.alpha=[2, 1]"], "must rise"),
    ],
)
def test_recipes_that_contradict_themselves(model: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(model, *changes)


def test_best_values_of_the_toys_are_the_references(policy_toys: ModuleType) -> None:
    """The reference values of the notes on unmasking policies, sections 9.2 and 9.4."""
    module = policy_toys
    for alpha, wanted in ((0.0, 0.6710), (0.3, 0.5473), (1.0, 0.4690), (3.0, 0.3596)):
        assert module.Exchangeable(0.12).best(alpha) == pytest.approx(wanted, abs=6e-5)
    assert module.Trap().best(1.0) == pytest.approx(0.732, abs=0.01)
    rows = module.thresholds()
    assert [row["exact"] for row in rows] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learned_policies_reach_the_best_values(policy_toys: ModuleType, seed: int) -> None:
    module = policy_toys
    for alpha in (0.0, 0.3, 1.0, 3.0):
        assert module.exchangeable(alpha, seed)["share"] >= 0.95
    assert module.trap(seed)["alpha 1 temperature 0.5"]["share"] >= 0.90


@pytest.mark.slow
def test_a_forced_argmax_ends_in_one_position_a_step(policy_toys: ModuleType) -> None:
    """Where all rollouts of a group are alike nothing is left to learn from: the linear policy's absorbing state."""
    found = policy_toys.trap(0, fallback="argmax", network="linear", lr=3e-2, warmup=0, batches=90, sharps=(0.5,))
    row = found["alpha 1 temperature 0.5"]
    assert row["nfe"] > 11.5 and row["reward"] < 0.1


@pytest.mark.slow
def test_additive_speed_is_hacked_and_multiplicative_is_not(policy_toys: ModuleType) -> None:
    """One token in ten is right at first: all at once is the additive reward's optimum, slowly that of the other."""
    module = policy_toys
    hacked, honest = (module.hacking(speed, 0) for speed in (additive, multiplicative))
    assert hacked["nfe"] < 1.5 and honest["nfe"] > 3
    assert honest["reward"] > hacked["reward"]
