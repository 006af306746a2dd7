"""Exactness where all can be enumerated: probabilities sum to 1, and `trace` is the gradient of expected reward."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from unmask.rl.objective import Objective, build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

RULES = [
    "left_to_right",
    "left_to_right_stop",
    "confidence_1",
    "confidence_1_stop",
    "confidence_2",
    "threshold",
    "factor",
    "frechet",
    "entropy_budget",
    "drawn_order_1",
    "drawn_order_2",
    "sampled_1",
    "sampled_2",
    "sampled_1_stop",
    "sampled_threshold",
    "sampled_factor",
    "sampled_frechet",
    "sampled_leap",
    "sampled_halves",
    "sampled_eoser",
]
SAMPLED = ["sampled_1", "sampled_2", "sampled_1_stop"]
PROMPT = torch.tensor([1, 3])
CONSTANT = 0.3
# Relative error that the naive log-prob has at least, 10^5 times what the exact one may have. Observed over the nine
# cases below: 0.12 to 0.47 with a baseline near the mean reward, which flatters it most (0.31 to 0.86 at CONSTANT).
NAIVE_MARGIN, NAIVE_CONSTANT = 0.1, 0.5


def objective(unit: str = "token", bound: str = "sum", weight: str = "uniform", **estimator: object) -> Objective:
    return build_objective(
        {
            "estimator": {"name": "trace", "tokens": "all", **estimator},
            "unit": unit,
            "bound": bound,
            "surrogate": "importance",
            "weight": weight,
            "chunk": 50,
        }
    )


def reward_of(toys: ModuleType, tokens_BL: Tensor) -> Tensor:
    """Return a fixed random reward for every final canvas, undecided positions included."""
    table = torch.rand((toys.V + 1) ** toys.L, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return table[(tokens_BL * torch.tensor([(toys.V + 1) ** i for i in range(toys.L)])).sum(1)]


def exact_gradient(toys: ModuleType, toy, paths: list) -> Tensor:
    """Return the autodiff gradient of E[R] = sum over paths of P(path) R(path)."""
    reward = reward_of(toys, torch.tensor([path.canvas for path in paths]))
    sum(path.probability * r for path, r in zip(paths, reward, strict=True)).backward()
    return toy.gradient()


def trace_gradient(
    toys: ModuleType, toy, rule, paths: list, chosen: Objective, *, exact: bool = True, constant: float = CONSTANT
) -> Tensor:
    """Return E[trace's gradient of the expected reward]: every path once, its advantage times its probability."""
    trajectory = toys.record(paths, rule, PROMPT)
    reward = reward_of(toys, trajectory.tokens_BL)
    probability = torch.stack([path.probability for path in paths]).detach()
    section = toys.section(rule)
    if not exact:
        section["exact"] = False
    sampler = build_sampler(section, temperature=rule.temperature)
    plan = chosen.plan(toy, None, trajectory, probability * (reward - constant), rng=None, sampler=sampler)
    chosen.backward(toy, plan)
    return -plan.mass * toy.gradient()


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RULES)
def test_trajectory_probabilities_sum_to_one(toys: ModuleType, name: str, seed: int) -> None:
    """As enumerated, and as the library recomputes them: exp of the sum of a rollout's action log-probs."""
    toy, rule = toys.Toy(seed), toys.RULES[name]
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    assert sum(path.probability.item() for path in paths) == pytest.approx(1, abs=1e-12)
    trajectory = toys.record(paths, rule, PROMPT)
    sampler = build_sampler(toys.section(rule), temperature=rule.temperature)
    chosen = Objective(**{**objective().__dict__, "old": "recompute"})
    plan = chosen.plan(toy, None, trajectory, torch.ones(len(paths)), rng=None, sampler=sampler)
    logprob_B = torch.zeros(len(paths), dtype=torch.float64).index_add(0, plan.views.actions.row_A, plan.old_A)
    expected = torch.stack([path.probability for path in paths]).detach()
    torch.testing.assert_close(logprob_B.exp(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.behaviour_A, plan.old_A, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RULES)
def test_expected_trace_gradient_is_the_gradient_of_expected_reward(toys: ModuleType, name: str, seed: int) -> None:
    toy, rule = toys.Toy(seed), toys.RULES[name]
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    exact = exact_gradient(toys, toy, paths)
    assert error(trace_gradient(toys, toy, rule, paths, objective()), exact) <= 1e-6


@pytest.mark.parametrize("name", ["confidence_2", "sampled_2", "sampled_1_stop"])
@pytest.mark.parametrize(("unit", "bound", "weight"), [("step", "mean", "uniform"), ("rollout", "mean", "uniform")])
def test_other_units_have_the_same_gradient_on_policy(
    toys: ModuleType, name: str, unit: str, bound: str, weight: str
) -> None:
    toy, rule = toys.Toy(3), toys.RULES[name]
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    exact = exact_gradient(toys, toy, paths)
    assert error(trace_gradient(toys, toy, rule, paths, objective(unit, bound, weight)), exact) <= 1e-6


@pytest.mark.parametrize("name", ["left_to_right", "sampled_1"])
def test_whole_rollouts_weigh_one_and_are_exact_off_policy(toys: ModuleType, name: str) -> None:
    """Unit rollout, bound sum, weight per_step_mean: -rho A a rollout, exact for samples of another policy too."""
    toy, rule = toys.Toy(4), toys.RULES[name]
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    exact = exact_gradient(toys, toy, paths)
    behaviour = toys.Toy(5)
    behaviour.model.canvas.data = toy.model.canvas.data + 0.2 * behaviour.model.canvas.data
    behaviour.model.prompt.data = toy.model.prompt.data.clone()
    # Only with these rules can both policies take the same paths (samplers.md section 1.1).
    others = toys.enumerate_paths(behaviour, rule, PROMPT)
    assert {(p.canvas, *sorted(p.born.items())) for p in others} == {(p.canvas, *sorted(p.born.items())) for p in paths}
    found = trace_gradient(toys, toy, rule, others, objective("rollout", "sum", "per_step_mean"))
    assert error(found, exact) <= 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SAMPLED)
def test_naive_sampled_confidence_is_biased(toys: ModuleType, name: str, seed: int) -> None:
    toy, rule = toys.Toy(seed), toys.RULES[name]
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    exact = exact_gradient(toys, toy, paths)
    for constant in (CONSTANT, NAIVE_CONSTANT):
        naive = trace_gradient(toys, toy, rule, paths, objective(), exact=False, constant=constant)
        assert error(naive, exact) >= NAIVE_MARGIN


def test_infilling_is_exact(toys: ModuleType) -> None:
    """A given token is context and never an action."""
    toy, rule = toys.Toy(6), toys.RULES["sampled_1"]
    paths = toys.enumerate_paths(toy, rule, PROMPT, start=(toys.MASK, 1, toys.MASK))
    exact = exact_gradient(toys, toy, paths)
    assert error(trace_gradient(toys, toy, rule, paths, objective()), exact) <= 1e-6


def rollouts(toys: ModuleType, toy, rule, rows: int) -> Trajectory:
    sampler = build_sampler(toys.section(rule), temperature=rule.temperature)
    prompt_BQ = PROMPT.expand(rows, -1)
    canvas_BL = torch.full((rows, toys.L), toys.MASK)
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    return denoise(toy, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0)


@pytest.mark.parametrize("name", RULES)
def test_denoise_samples_the_enumerated_distribution(toys: ModuleType, name: str) -> None:
    """20,000 rollouts: frequencies within 4 standard errors, recorded log-probs equal to the enumerated ones."""
    toy, rule, rows = toys.Toy(0), toys.RULES[name], 20_000
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    # Only a drawn order is told apart by the ranks.
    kept = ("born", "rank") if rule.kind == "drawn_order" else ("born",)
    keys = [(path.canvas, *(tuple(getattr(path, k).get(i, -1) for i in range(toys.L)) for k in kept)) for path in paths]
    index = {key: n for n, key in enumerate(keys)}
    trajectory = rollouts(toys, toy, rule, rows)
    trajectory.validate()
    tables = (trajectory.tokens_BL, *(getattr(trajectory, f"{k}_BL") for k in kept))
    path_B = torch.tensor([index[key] for key in zip(*(map(tuple, t.tolist()) for t in tables), strict=True)])
    probability = torch.stack([path.probability for path in paths]).detach()
    expected, found = probability * rows, torch.bincount(path_B, minlength=len(paths))
    # Pearson's statistic over cells of at least 5 expected rollouts, against its mean + 4 standard deviations.
    large = expected >= 5
    statistic = ((found - expected).square() / expected)[large].sum().item()
    assert statistic <= large.sum() + 4 * (2 * large.sum()) ** 0.5
    exact = toys.record(paths, rule, PROMPT)
    torch.testing.assert_close(trajectory.logprob_BL.double(), exact.logprob_BL[path_B], rtol=0, atol=1e-6)
    if rule.kind in ("sampled", "drawn_order"):
        recorded = trajectory.choice_logprob_BS.double()
        torch.testing.assert_close(recorded, exact.choice_logprob_BS[path_B], rtol=0, atol=1e-6)
