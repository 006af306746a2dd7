"""Labels of the end for a warm start, the head on hidden states, a shortlist of candidates, a run with all of it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.planner import FEATURES, PlannerSpec, new_planner
from unmask.policies.planner_distributions import Categorical
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import orders
from unmask.rl.planning import Planning, thresholds
from unmask.rl.planscores import final_labels
from unmask.rl.speed import multiplicative
from unmask.rl.surrogates import ppo_clip
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

CANVAS, GROUP, ROWS, WIDTH = 12, 4, 8, 32
SECTION = {"schedule": {"name": "whole", "per_step": 1}, "score": "planner", "selection": "planned"}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return shortrun.decided_denoiser()


def planning_of(spec: PlannerSpec | None = None, **more: Any) -> Planning:
    made = new_planner(spec or PlannerSpec(width=16, mlp=32), seed=2)
    rng = torch.Generator().manual_seed(3)
    for parameter in made.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    return Planning(made, partial(ppo_clip, low=0.5, high=0.5), multiplicative, **{"group": GROUP, "seed": 7, **more})


def roll(denoiser: Any, planning: Planning, **more: Any) -> tuple[Trajectory, Any]:
    sampler = planning.acting(build_sampler({**SECTION, **more.pop("sampler", {})}, temperature=0.0))
    prompt_BQ = torch.arange(ROWS)[:, None] // GROUP + 40
    canvas_BL = torch.full((ROWS, more.pop("canvas", CANVAS)), denoiser.family.mask_token_id)
    options = {"seed": 7, "step": 0, "drafts": planning.needs_drafts, **more}
    return denoise(denoiser, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(ROWS), **options), sampler


def every_step(made: Trajectory) -> tuple[Tensor, Tensor]:
    place_S = torch.arange(int(made.steps_B.max()))
    return (place_S < made.steps_B[:, None]).nonzero(as_tuple=True)


def likeliest(denoiser: Denoiser, made: Trajectory, row_N: Tensor, step_N: Tensor) -> Tensor:
    """Return the likeliest token of every position of the canvases, from forwards of their own."""
    ids_NT = torch.cat([made.prompt_BQ[row_N], made.canvas_before(row_N, step_N)], dim=1)
    logits_NLV = denoiser.logits(ids_NT)[:, -CANVAS:]
    logits_NLV[..., denoiser.family.mask_token_id] = -torch.inf
    return logits_NLV.argmax(dim=-1)


def test_labels_say_which_likeliest_tokens_are_the_final_ones(denoiser: Denoiser) -> None:
    planning = planning_of(levels=(0.3,), warmup=1, labels="final")
    made, _ = roll(denoiser, planning)
    row_N, step_N = every_step(made)
    found_NL = final_labels(made, row_N, step_N)
    open_NL = made.canvas_before(row_N, step_N) == made.mask_token_id
    open_NL &= made.tokens_BL[row_N] != made.mask_token_id
    same_NL = likeliest(denoiser, made, row_N, step_N) == made.tokens_BL[row_N]
    assert torch.equal(found_NL, torch.where(open_NL, same_NL.long(), -1).to(torch.int8))
    assert {-1, 0, 1} == set(found_NL.unique().tolist())
    # What a step decides is final, nothing being taken back.
    token_NL, _ = made.drawn_at(row_N, step_N)
    assert (found_NL[token_NL != made.mask_token_id] == 1).all()


def test_the_warm_start_is_the_likelihood_of_the_labels(denoiser: Denoiser) -> None:
    planning = planning_of(levels=(0.3, 0.9), warmup=1, labels="final", chunk=5)
    made, sampler = roll(denoiser, planning)
    planning.batch = 0
    plan = planning.plan(None, None, made, torch.zeros(ROWS), rng=None, sampler=sampler)
    assert plan.trajectory.draft_BSL is None, "drafts are labels by now"
    again = type(plan).from_tensors(plan.trajectory, sampler, plan.tensors())
    found = planning.backward(None, again)["loss"]
    row_N, step_N = every_step(made)
    label_NL = final_labels(made, row_N, step_N)
    feature_NLF = made.features_BSLF[row_N, step_N].float()
    chance_NL = torch.sigmoid(planning.planner.network(feature_NLF).logit_BL)
    likelihood_NL = torch.where(label_NL == 1, chance_NL, torch.where(label_NL == 0, 1 - chance_NL, 1.0))
    assert found == pytest.approx(-likelihood_NL.log().sum(dim=1).mean().item(), rel=1e-5)
    # After the warm start a plan has none.
    planning.batch = 1
    assert planning.plan(None, None, made, torch.ones(ROWS), rng=None, sampler=sampler).label_NL.shape[1] == 0


HEAD = {"network": "hidden", "hidden": WIDTH, "width": 16, "mlp": 24}


@pytest.mark.parametrize("static", [False, True])
def test_the_head_sees_the_denoisers_last_states(denoiser: Denoiser, static: bool) -> None:
    planning = planning_of(PlannerSpec(**HEAD))
    made, sampler = roll(denoiser, planning, static=static)
    row_N, step_N = every_step(made)
    canvas_NL = made.canvas_before(row_N, step_N)
    hidden_NLD = denoiser.hidden(torch.cat([made.prompt_BQ[row_N], canvas_NL], dim=1))[:, -CANVAS:]
    wanted_NLD = hidden_NLD * (canvas_NL == made.mask_token_id)[..., None]
    found_NLD = made.features_BSLF[row_N, step_N][..., len(FEATURES) :].float()
    torch.testing.assert_close(found_NLD, wanted_NLD, rtol=2e-3, atol=2e-3)
    # What is recorded is enough: ratios are 1 with no denoiser, and the states matter.
    advantage_B = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    plan = planning.plan(None, None, made, advantage_B, rng=None, sampler=sampler)
    assert planning.backward(None, plan)["ratio_max_deviation"] < 1e-4
    assert planning.planner.network.enter.weight.grad.norm() > 0


def test_the_head_against_its_formulas() -> None:
    """Layer by layer, the block's attention with PyTorch's own layer where no position turns a query."""
    network = planning_of(PlannerSpec(**HEAD, features=("odds", "masked"))).planner.network.double()
    weights = dict(network.named_parameters())
    feature_BLF = torch.randn(2, 1, 2 + WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = linear("enter", norm("norm_0", feature_BLF[..., 2:]))
    # One position attends to itself alone.
    x = x + linear("join", linear("value", norm("norm_1", x)))
    x = x + linear("down", torch.nn.functional.gelu(linear("up", norm("norm_2", x))))
    x = torch.cat([norm("norm_3", x), feature_BLF[..., :2]], dim=-1)
    for layer in range(3):
        inner = norm(f"layers.{layer}.1", linear(f"layers.{layer}.0", x))
        x = inner * torch.sigmoid(inner)
    torch.testing.assert_close(network(feature_BLF).logit_BL, linear("output", x).squeeze(-1))
    # And more positions are seen: what one says depends on the others.
    longer_BLF = torch.cat([feature_BLF, -feature_BLF.flip(0)], dim=1)
    assert not torch.allclose(network(longer_BLF).logit_BL[:, :1], network(feature_BLF).logit_BL)


def test_a_denoiser_without_the_states_is_refused(denoiser: Denoiser, toys: ModuleType) -> None:
    with pytest.raises(RecipeError, match="gives logits alone"):
        roll(toys.Toy(0), planning_of(PlannerSpec(**HEAD)), canvas=toys.L)
    with pytest.raises(RecipeError, match="states of width 8"):
        roll(denoiser, planning_of(PlannerSpec(**HEAD | {"hidden": 8})))


def test_a_shortlist_holds_the_most_confident(denoiser: Denoiser) -> None:
    planning = planning_of(PlannerSpec(width=16, mlp=32, distribution="categorical", shortlist=3))
    made, _ = roll(denoiser, planning)
    row_N, step_N = every_step(made)
    candidate_NL = made.candidate_BSL[row_N, step_N]
    masked_NL = made.canvas_before(row_N, step_N) == made.mask_token_id
    odds_NL = made.features_BSLF[row_N, step_N][..., FEATURES.index("odds")].float()
    assert torch.equal(candidate_NL.sum(dim=1), masked_NL.sum(dim=1).clamp(max=3))
    lowest_N = odds_NL.masked_fill(~candidate_NL, torch.inf).amin(dim=1)
    others_N = odds_NL.masked_fill(candidate_NL | ~masked_NL, -torch.inf).amax(dim=1)
    assert (lowest_N >= others_N).all() and not (candidate_NL & ~masked_NL).any()
    chosen_NL = made.drawn_at(row_N, step_N)[0] != made.mask_token_id
    assert not (chosen_NL & ~candidate_NL).any()


def test_a_warm_up_by_alpha_has_a_threshold_a_trade_off() -> None:
    low, high, levels = 0.1, 10.0, [0.97, 0.9, 0.5]
    planning = planning_of(levels=tuple(levels), warmup=2, by_alpha=True, alpha=(low, high))
    id_B = torch.arange(400)
    for batch in range(2):
        alpha_B = planning.alphas(id_B, batch).double().numpy()
        assert len(set(alpha_B.tolist())) == 400, "each rollout has its own"
        place_B = np.log(alpha_B / low) / np.log(high / low)
        odds_B = np.interp(place_B, [0, 0.5, 1], [math.log(level / (1 - level)) for level in levels])
        found_B = thresholds(planning, id_B, batch).double().numpy()
        np.testing.assert_allclose(found_B, 1 / (1 + np.exp(-odds_B)), atol=2e-6)
        assert found_B.min() < 0.55 and found_B.max() > 0.965
    plain = planning_of(levels=tuple(levels), warmup=2, alpha=(low, high))
    for batch in (2, -1):
        assert torch.equal(planning.alphas(id_B, batch), plain.alphas(id_B, batch)), "one a group again"


def test_rollouts_of_a_warm_up_by_alpha_are_the_thresholds(denoiser: Denoiser) -> None:
    planning = planning_of(levels=(0.99, 0.1), warmup=1, by_alpha=True, alpha=(0.5, 2.0))
    made, _ = roll(denoiser, planning)
    assert len(made.steps_B.unique()) > 1, "thresholds of several speeds"
    level_B = thresholds(planning, torch.arange(ROWS), 0)
    for row in range(ROWS):
        section = {"schedule": SECTION["schedule"], "selection": {"name": "threshold", "level": level_B[row].item()}}
        prompt_BQ = torch.full((1, 1), row // GROUP + 40)
        canvas_BL = torch.full((1, CANVAS), denoiser.family.mask_token_id)
        rule = build_sampler({**section, "score": "confidence"}, temperature=0.0)
        alone = denoise(denoiser, rule, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.tensor([row]), seed=7, step=0)
        assert torch.equal(alone.born_BL[0], made.born_BL[row])


def test_the_order_of_the_k_best_by_hand() -> None:
    odds_NL = torch.tensor([[3.0, 1.0, 2.0, 9.0], [1.0, 1.0, 0.0, 1.0]])
    candidate_NL = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found_NL = orders.top_k(odds_NL, candidate_NL, k=2)
    torch.testing.assert_close(found_NL, torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    # For a policy kept to the k best the pull is log k - H.
    logit_NL = torch.tensor([[0.3, 0.0, -1.0, 0.0]])
    policy = Categorical(logit_NL, torch.tensor([[True, False, True, False]]))
    pull_N = orders.pull(partial(orders.top_k, k=2), policy, odds_NL[:1], policy.candidate_BL)
    p = torch.sigmoid(torch.tensor(1.3))
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(pull_N, (torch.tensor(2.0).log() - entropy)[None])
    with pytest.raises(RecipeError, match="at least 1"):
        orders.top_k(odds_NL, candidate_NL, k=0)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"distribution": "categorical"}, {"levels": (0.5,), "labels": "final"}, "teaches each position alone"),
        ({"distribution": "categorical", "shortlist": 3}, {"levels": (0.5,), "block": 4}, "drop expert.block"),
        ({}, {"levels": (0.9, 0.5), "by_alpha": True}, r"use \[low, high\]"),
        ({}, {"levels": (0.9, 0.5), "by_alpha": True, "alpha": (0.5, 2.0)}, "give expert.warmup"),
        ({}, {"levels": (1.0, 0.5), "by_alpha": True, "alpha": (0.5, 2.0)}, "levels below 1"),
        ({"shortlist": 3}, {}, "categorical choices"),
        ({"network": "hidden"}, {}, "as many numbers a position"),
        ({"hidden": 8}, {}, "others read none"),
    ],
)
def test_what_cannot_be_is_refused(spec: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planning_of(PlannerSpec(**spec), **options)


RECIPE = shortrun.RECIPE.replace(", lora: {rank: 2}", "").replace("name: short", "name: back")
RECIPE = RECIPE.replace(
    "score: confidence, selection: top", "score: planner, selection: planned, remasking: planned"
).replace("method: cj_grpo\nobjective: {inner_steps: 2, beta: 0.0}", "method: unmask_policy")
RECIPE += """planner: {network: hidden, width: 16, mlp: 32, distribution: remasking, back_bias: -1.0,
  expert: {levels: [0.5], warmup: 1, labels: final}}
"""


def test_a_run_with_all_of_it_trains_resumes_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = shortrun.save_model(tmp_path / "model")
    changes = ("run.save_every=1", "run.keep=9", "rollout.temperature=0.0")
    # The second inner step on the labels is resumed from the plan of the first.
    _, _, planner = shortrun.planner_run(parse_recipe(RECIPE.replace("MODEL", str(model)), changes), resume=1)
    assert planner.spec.hidden == WIDTH and planner.spec.features[-2:] == ("standing", "current")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout.sampler.remasking=null"], "set sampler.remasking to planned"),
        (["planner.distribution=bernoulli"], "takes no tokens back"),
        (["rollout.sampler.remasking=doubt"], "set sampler.remasking to planned"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path: Path, changes: list[str], message: str) -> None:
    model = shortrun.save_model(tmp_path / "model")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE.replace("MODEL", str(model)), changes)
    assert message in str(caught.value)
