"""The chunked backward against one graph written out in plain loops, for every combination of parts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import RecipeError
from unmask.rl.losses import NonFiniteError, RatioError
from unmask.rl.objective import Objective, build_objective
from unmask.rl.plan import Plan
from unmask.rl.replay import IMPOSSIBLE, replay_all

UNITS, BOUNDS, SURROGATES, DIVERGENCES = (
    ("token", "step", "rollout"),
    ("sum", "mean"),
    ("importance", "ppo_clip"),
    "123",
)


def objective(**choices: object) -> Objective:
    section = {"estimator": "trace", "unit": "token", "surrogate": "importance", "weight": "uniform", "chunk": 5}
    return build_objective(section | choices)


def gradient(w, chosen: Objective, **changes: object) -> tuple[dict[str, float], Tensor, Plan]:
    w = replace(w, **changes)
    plan = chosen.plan(w.policy, w.reference, w.trajectory, w.advantage_B, rng=None, sampler=w.sampler)
    return chosen.backward(w.policy, plan), w.policy.gradient(), plan


CLIP = {"name": "ppo_clip", "low": 0.1, "high": 0.2}


@pytest.mark.parametrize("name", ["confidence_2", "sampled_2"])
@pytest.mark.parametrize("weight", ["uniform", "per_step_mean"])
@pytest.mark.parametrize(
    ("unit", "bound", "surrogate", "divergence"), list(itertools.product(UNITS, BOUNDS, SURROGATES, DIVERGENCES))
)
def test_chunked_gradient_equals_the_one_graph_gradient(
    toys: ModuleType,
    onegraph: ModuleType,
    name: str,
    weight: str,
    unit: str,
    bound: str,
    surrogate: str,
    divergence: str,
) -> None:
    w = onegraph.world(toys, name)
    expected = onegraph.OneGraph(toys, w).loss(
        unit=unit, bound=bound, surrogate=surrogate, weight=weight, divergence=divergence, beta=0.7
    )
    expected.backward()
    exact = w.policy.gradient()
    clip = CLIP if surrogate == "ppo_clip" else surrogate
    chosen = objective(unit=unit, bound=bound, surrogate=clip, weight=weight, divergence=f"k{divergence}", beta=0.7)
    statistics, found, _ = gradient(w, chosen)
    assert exact.norm() > 0.01
    assert ((found - exact).norm() / exact.norm()).item() <= 1e-6
    assert statistics["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["confidence_1_stop", "sampled_1_stop"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_truncated_correction_weighs_recomputed_ratios(
    toys: ModuleType, onegraph: ModuleType, name: str, unit: str, bound: str
) -> None:
    w = onegraph.world(toys, name)
    correction = {"name": "truncated", "ceiling": 1.1}
    chosen = objective(unit=unit, bound=bound, surrogate=CLIP, old="recompute", correction=correction)
    old = onegraph.world(toys, name, distance=-0.2).behaviour
    plan = chosen.plan(old, None, w.trajectory, w.advantage_B, rng=None, sampler=w.sampler)
    chosen.backward(w.policy, plan)
    found = w.policy.gradient()
    onegraph.OneGraph(toys, w).loss(
        unit=unit,
        bound=bound,
        surrogate="ppo_clip",
        weight="uniform",
        divergence="3",
        beta=0,
        ceiling=1.1,
        recompute=old,
    ).backward()
    exact = w.policy.gradient()
    assert ((found - exact).norm() / exact.norm()).item() <= 1e-6


COMBINATIONS = [("token", "sum", "uniform"), ("step", "mean", "per_step_mean"), ("rollout", "mean", "uniform")]


@pytest.mark.parametrize(("unit", "bound", "weight"), COMBINATIONS)
@pytest.mark.parametrize("name", ["confidence_1_stop", "sampled_2"])
class TestInvariance:
    """Nothing about how a batch is laid out changes the gradient."""

    def parts(self, onegraph, toys, name, unit, bound, weight, chunk=5):
        w = onegraph.world(toys, name)
        chosen = objective(unit=unit, bound=bound, weight=weight, surrogate=CLIP, beta=0.3, chunk=chunk)
        return w, chosen

    def test_chunk_size(self, onegraph, toys, name, unit, bound, weight) -> None:
        exact = gradient(*self.parts(onegraph, toys, name, unit, bound, weight, chunk=1000))[1]
        for chunk in (1, 2, 7):
            found = gradient(*self.parts(onegraph, toys, name, unit, bound, weight, chunk=chunk))[1]
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)

    def test_order_of_rollouts(self, onegraph, toys, name, unit, bound, weight) -> None:
        w, chosen = self.parts(onegraph, toys, name, unit, bound, weight)
        order = torch.randperm(onegraph.ROWS, generator=torch.Generator().manual_seed(1))
        shuffled = {"trajectory": w.trajectory.select(order), "advantage_B": w.advantage_B[order]}
        torch.testing.assert_close(gradient(w, chosen, **shuffled)[1], gradient(w, chosen)[1], rtol=1e-6, atol=1e-9)

    def test_prompt_padding(self, onegraph, toys, name, unit, bound, weight) -> None:
        w, chosen = self.parts(onegraph, toys, name, unit, bound, weight)
        padded = replace(
            w.trajectory,
            prompt_BQ=torch.nn.functional.pad(w.trajectory.prompt_BQ, (4, 0), value=1),
            prompt_mask_BQ=torch.nn.functional.pad(w.trajectory.prompt_mask_BQ, (4, 0)),
        )
        found = gradient(w, chosen, trajectory=padded)[1]
        torch.testing.assert_close(found, gradient(w, chosen)[1], rtol=1e-6, atol=1e-9)

    def test_ranks(self, onegraph, toys, name, unit, bound, weight, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two unequal shares with the global mass: their gradients and losses sum to those of one process."""
        w, chosen = self.parts(onegraph, toys, name, unit, bound, weight)
        statistics, exact, whole = gradient(w, chosen)
        shares, seen = [torch.arange(4), torch.arange(4, onegraph.ROWS)], []
        monkeypatch.setattr("unmask.rl.objective.total", lambda value: seen.append(value) or whole.mass)
        found, loss = torch.zeros_like(exact), 0.0
        for share in shares:
            part = {"trajectory": w.trajectory.select(share), "advantage_B": w.advantage_B[share]}
            own, vector, _ = gradient(w, chosen, **part)
            found, loss = found + vector, loss + own["loss"]
        assert sum(seen) == pytest.approx(whole.mass, rel=1e-6)
        assert loss == pytest.approx(statistics["loss"], rel=1e-6)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)

    def test_saved_plan(self, onegraph, toys, name, unit, bound, weight) -> None:
        """A plan restored from its tensors gives the very same bits."""
        w, chosen = self.parts(onegraph, toys, name, unit, bound, weight)
        statistics, exact, plan = gradient(w, chosen)
        saved = plan.tensors()
        assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved), "safetensors refuses shared memory"
        restored = Plan.from_tensors(w.trajectory, w.sampler, saved)
        assert chosen.backward(w.policy, restored) == statistics
        assert torch.equal(w.policy.gradient(), exact)


def test_first_inner_step_has_ratio_one(toys: ModuleType, onegraph: ModuleType) -> None:
    for name in toys.RULES:
        for unit in UNITS:
            w = onegraph.world(toys, name, distance=0.0)
            statistics, _, _ = gradient(w, objective(unit=unit, surrogate=CLIP))
            assert statistics["ratio_max_deviation"] <= 1e-6
            assert statistics["mismatch_max"] <= 1e-6
            assert statistics["clip_fraction"] == 0.0


def test_rollouts_without_advantage_cost_no_forward_but_keep_their_mass(toys: ModuleType, onegraph: ModuleType) -> None:
    w = onegraph.world(toys, "left_to_right")
    statistics, _, plan = gradient(w, objective())
    # All rollouts have 3 tokens but the one with a given token (2) and those that an EOS ends early.
    actions_B = w.trajectory.action_BL().sum(1)
    assert plan.mass == actions_B[~w.advantage_B.isnan()].sum()
    active = ~w.advantage_B.isnan() & (w.advantage_B != 0)
    assert not set(plan.views.row_N.tolist()) & {5, 7}
    assert statistics["tokens"] == actions_B[active].sum()
    assert statistics["rollouts"] == active.sum()
    assert sum(w.policy.calls) == statistics["views"]
    with_divergence = gradient(w, objective(beta=0.1))[2]
    assert 5 in with_divergence.views.row_N and 7 not in with_divergence.views.row_N


def test_a_batch_with_nothing_to_learn(toys: ModuleType, onegraph: ModuleType) -> None:
    for advantage_B in (torch.zeros(onegraph.ROWS), torch.full((onegraph.ROWS,), torch.nan)):
        w = replace(onegraph.world(toys, "sampled_1"), advantage_B=advantage_B)
        for unit in UNITS:
            statistics, found, _ = gradient(w, objective(unit=unit))
            assert statistics["loss"] == 0 and statistics["tokens"] == 0 and not found.any()
            assert all(value == value for value in statistics.values()), "no NaN"


def test_statistics_by_hand(toys: ModuleType, onegraph: ModuleType) -> None:
    """Left to right, one token a step: ratios are those of single tokens, known from the two tables."""
    w = onegraph.world(toys, "left_to_right", distance=0.5)
    chosen = objective(surrogate=CLIP, beta=0.2)
    statistics, _, plan = gradient(w, chosen)
    graph = onegraph.OneGraph(toys, w)
    new, old = graph.log_probs(w.policy), graph.recorded()
    keys = [key for key in new if not w.advantage_B[key[0]].isnan()]
    delta = torch.tensor([(new[key] - old[key]).item() for key in keys], dtype=torch.float64)
    advantage = torch.tensor([w.advantage_B[key[0]].item() for key in keys], dtype=torch.float64)
    clipped = ((delta.exp() > 1.2) & (advantage > 0)) | ((delta.exp() < 0.9) & (advantage < 0))
    gap = torch.tensor([(new[k] - graph.token(w.reference, *k)).item() for k in keys], dtype=torch.float64)
    entropy = torch.stack(
        [
            torch.distributions.Categorical(logits=graph.logits(w.policy, b, s)[0][i] / w.rule.temperature).entropy()
            for b, s, i in keys
        ]
    )
    assert 0 < clipped.sum() < len(keys)
    expected = {
        "ratio_max_deviation": (delta.exp() - 1).abs().max(),
        "ratio_p50": delta.exp().quantile(0.5),
        "ratio_p99": delta.exp().quantile(0.99),
        "clip_fraction": clipped.sum() / (advantage != 0).sum(),
        "kl": ((-gap).exp() - 1 + gap).mean(),
        "kl_old": (delta.exp() - 1 - delta).mean(),
        "mismatch_mean": delta.abs().mean(),
        "mismatch_max": delta.abs().max(),
        "entropy": entropy.mean().detach(),
        "tokens": len(keys),
        "mass": plan.mass,
    }
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("unit", UNITS)
def test_a_choice_that_became_impossible_has_ratio_zero(toys: ModuleType, onegraph: ModuleType, unit: str) -> None:
    """With three tokens the bar can fall below all of them at an open position; with a vocabulary it hardly can."""
    w = replace(onegraph.world(toys, "sampled_1_stop"), policy=toys.Toy(6))
    statistics, found, _ = gradient(w, objective(unit=unit))
    graph = onegraph.OneGraph(toys, w)
    impossible = sum(value.item() == IMPOSSIBLE for value in graph.log_probs(w.policy).values())
    assert impossible > 0 and statistics["ratio_max_deviation"] >= 1 - 1e-6
    parts = {"unit": unit, "bound": "sum", "surrogate": "importance", "weight": "uniform"}
    graph.loss(**parts, divergence="3", beta=0).backward()
    exact = w.policy.gradient()
    assert bool(found.isfinite().all()) and ((found - exact).norm() / exact.norm()).item() <= 1e-6


@pytest.mark.parametrize("unit", UNITS)
def test_nan_is_one_error_that_names_the_rollout(toys: ModuleType, onegraph: ModuleType, unit: str) -> None:
    """Before any gradient exists: one chunk holds all views."""
    w = onegraph.world(toys, "left_to_right")
    plan = objective(unit=unit, chunk=1000).plan(
        w.policy, None, w.trajectory, w.advantage_B, rng=None, sampler=w.sampler
    )
    state = int((plan.views.canvas()[-1] * torch.tensor([1, 4, 16])).sum())
    w.policy.model.canvas.data[state] = torch.nan
    rows = plan.views.row_N[(plan.views.canvas() == plan.views.canvas()[-1]).all(dim=1)]
    with pytest.raises(NonFiniteError, match=rf"rollout {100 + int(rows[0])}: a log-probability is nan"):
        objective(unit=unit, chunk=1000).backward(w.policy, plan)
    assert all(p.grad is None for p in w.policy.model.parameters())
    assert issubclass(NonFiniteError, ValueError)


def test_an_infinite_ratio_is_an_error_and_a_clipped_one_is_not(toys: ModuleType, onegraph: ModuleType) -> None:
    """Without a limit on the ratio."""
    w = onegraph.world(toys, "left_to_right")
    for advantage, fails in ((-1.0, True), (1.0, False)):
        chosen = objective(surrogate=CLIP, ratio_limit=None)
        plan = chosen.plan(
            w.policy, None, w.trajectory, torch.full((onegraph.ROWS,), advantage), rng=None, sampler=w.sampler
        )
        old_A = plan.old_A.clone()
        old_A[4] = -2000.0
        if fails:
            with pytest.raises(NonFiniteError, match=r"surrogate loss is inf"):
                chosen.backward(w.policy, replace(plan, old_A=old_A))
        else:
            statistics = chosen.backward(w.policy, replace(plan, old_A=old_A))
            assert statistics["clip_fraction"] > 0 and bool(w.policy.gradient().isfinite().all())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("clip", [True, False])
def test_a_ratio_beyond_the_limit_is_an_error(toys: ModuleType, onegraph: ModuleType, unit: str, clip: bool) -> None:
    """Clipped or not, before any gradient exists; at the limit nothing happens."""
    w, surrogate = onegraph.world(toys, "left_to_right"), CLIP if clip else "importance"
    chosen = objective(unit=unit, surrogate=surrogate, chunk=1000)
    plan = chosen.plan(w.policy, None, w.trajectory, torch.ones(onegraph.ROWS), rng=None, sampler=w.sampler)
    old_A = plan.old_A.clone()
    old_A[4] -= 5.0
    plan = replace(plan, old_A=old_A)
    logprob_A = replay_all(w.policy, plan.views, 1000).logprob_A
    log_ratio_U = chosen.loss(plan, logprob_A).log_ratio_U
    largest, row = log_ratio_U.max().exp().item(), int(plan.views.row_N[plan.views.view_K[4]])
    told = rf"rollout {100 + row}: an importance ratio is {largest:.3g}, .*\(1 of \d+ units"
    with pytest.raises(RatioError, match=told):
        replace(chosen, ratio_limit=0.99 * largest).backward(w.policy, plan)
    assert all(p.grad is None for p in w.policy.model.parameters())
    statistics = replace(chosen, ratio_limit=1.01 * largest).backward(w.policy, plan)
    assert statistics["ratio_max_deviation"] == pytest.approx(largest - 1, rel=1e-6)
    # Where the surrogate gets the bound itself there is no ratio.
    free = objective(unit=unit, surrogate="weighted_likelihood", old="none", ratio_limit=1.0001)
    free.backward(w.policy, replace(plan, old_A=torch.zeros_like(old_A)))


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"ratio_limit": 1.0}, "objective.ratio_limit: 1.0 must exceed 1"),
        ({"bound": "median"}, "objective.bound: bound: unknown part 'median'"),
        ({"old": "yesterday"}, "objective.old"),
        ({"correction": "truncated"}, "set old: recompute"),
        ({"correction": {"name": "clipped"}, "old": "recompute"}, "objective.correction: 'clipped'"),
        ({"chunk": 0}, "objective.chunk: 0"),
        ({"beta": -1.0}, "objective.beta"),
        ({"surrogate": {"name": "ppo_clip", "low": 1.5}}, "surrogate.low: 1.5"),
        ({"unit": "sentence"}, "unknown part 'sentence'"),
    ],
)
def test_impossible_objectives_are_refused_when_built(choices: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        objective(**choices)


def test_plans_that_cannot_be_made_are_refused(toys: ModuleType, onegraph: ModuleType) -> None:
    w = onegraph.world(toys, "sampled_1")

    def plan(chosen: Objective, **changes: object) -> None:
        v = replace(w, **changes)
        chosen.plan(v.policy, v.reference, v.trajectory, v.advantage_B, rng=None, sampler=v.sampler)

    with pytest.raises(RecipeError, match="temperature: 0"):
        plan(objective(), trajectory=replace(w.trajectory, temperature=0.0))
    with pytest.raises(RecipeError, match=r"beta: 0\.1 weighs a divergence"):
        plan(objective(beta=0.1), reference=None)
    with pytest.raises(RecipeError, match="choice_logprob_BS is missing"):
        plan(objective(), trajectory=replace(w.trajectory, choice_logprob_BS=None))
    with pytest.raises(ValueError, match="rollout 102 is infinite"):
        plan(objective(), advantage_B=torch.where(torch.arange(onegraph.ROWS) == 2, torch.inf, 0.0))
    with pytest.raises(ValueError, match="does not fit 12 rollouts"):
        plan(objective(), advantage_B=torch.zeros(3))
