"""Exactness with tokens that are taken back: probabilities sum to 1, `trace` is the gradient of expected reward."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from unmask.rl.objective import Objective, build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

CASES = [
    *("rcr", "rcr_blocks", "rcr_reopen", "backtrack", "backtrack_token"),
    *("doubt", "doubt_sampled", "sceptical", "remdm", "edit", "edit_and_doubt"),
]
PROMPT = torch.tensor([1, 3])


def objective(old: str = "rollout") -> Objective:
    return build_objective(
        {
            "estimator": {"name": "trace", "tokens": "all"},
            "unit": "token",
            "bound": "sum",
            "surrogate": "importance",
            "weight": "uniform",
            "chunk": 50,
            "old": old,
        }
    )


def reward_of(canvas_BL: Tensor) -> Tensor:
    """Return a fixed random reward for every final canvas."""
    base, length = 4, canvas_BL.shape[1]
    table = torch.rand(base**length, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return table[(canvas_BL * torch.tensor([base**i for i in range(length)])).sum(1)]


@pytest.fixture(scope="module")
def worlds(toys: ModuleType, retractions: ModuleType) -> dict[tuple[str, int], tuple]:
    """Return (toy, case, paths) by case and seed."""
    made = {}
    for name in CASES:
        for seed in (0, 1):
            case = retractions.CASES[name]
            toy = toys.Toy(seed, length=case.length)
            made[name, seed] = toy, case, retractions.enumerate_paths(toy, case, PROMPT)
    return made


def test_every_case_is_here(retractions: ModuleType) -> None:
    assert set(CASES) == set(retractions.CASES)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_taken_back(worlds: dict, name: str) -> None:
    """No case is empty: some trajectories of it take tokens back, and drawn ones unless they are drafts."""
    retired = [entry for seed in (0, 1) for path in worlds[name, seed][2] for entry in path.retired]
    assert retired
    assert any(drawn for *_, drawn in retired) == (name != "sceptical")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_probabilities_sum_to_one(retractions: ModuleType, worlds: dict, name: str, seed: int) -> None:
    """As enumerated, and as the library recomputes them; the random part of ReMDM is no action of the policy."""
    toy, case, paths = worlds[name, seed]
    assert sum(path.probability.item() for path in paths) == pytest.approx(1, abs=1e-12)
    trajectory = retractions.record(paths, case, PROMPT)
    trajectory.validate()
    sampler = build_sampler(case.section, temperature=case.temperature)
    plan = objective("recompute").plan(toy, None, trajectory, torch.ones(len(paths)), rng=None, sampler=sampler)
    torch.testing.assert_close(plan.behaviour_A, plan.old_A, rtol=0, atol=1e-9)
    if name != "remdm":
        logprob_B = torch.zeros(len(paths), dtype=torch.float64)
        logprob_B = logprob_B.index_add(0, plan.views.actions.row_A, plan.old_A)
        expected_B = torch.stack([path.probability for path in paths]).detach()
        torch.testing.assert_close(logprob_B.exp(), expected_B, rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_expected_trace_gradient_is_the_gradient_of_expected_reward(
    retractions: ModuleType, worlds: dict, name: str, seed: int
) -> None:
    toy, case, paths = worlds[name, seed]
    trajectory = retractions.record(paths, case, PROMPT)
    reward_B = reward_of(trajectory.tokens_BL)
    sum(path.probability * r for path, r in zip(paths, reward_B, strict=True)).backward(retain_graph=True)
    exact = toy.gradient()
    probability_B = torch.stack([path.probability for path in paths]).detach()
    sampler, chosen = build_sampler(case.section, temperature=case.temperature), objective()
    plan = chosen.plan(toy, None, trajectory, probability_B * (reward_B - 0.3), rng=None, sampler=sampler)
    chosen.backward(toy, plan)
    found = -plan.mass * toy.gradient()
    assert ((found - exact).norm() / exact.norm()).item() <= 1e-6


def rollouts(toy, case, rows: int, *, static: bool | None = None) -> Trajectory:
    sampler = build_sampler(case.section, temperature=case.temperature)
    prompt_BQ, canvas_BL = PROMPT.expand(rows, -1), torch.tensor(case.canvas()).expand(rows, -1)
    draft_BL = torch.zeros_like(canvas_BL, dtype=torch.bool)
    draft_BL[:, list(case.drafts)] = True
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    ids_B = torch.arange(rows)
    return denoise(toy, sampler, prompt_BQ, mask_BQ, canvas_BL, ids_B, seed=0, draft_BL=draft_BL, static=static)


def keys_of(trajectory: Trajectory) -> list[tuple]:
    """Return each rollout's identity, in the words of `Path.key`."""
    lives: list[set] = [set() for _ in range(len(trajectory))]
    past = trajectory.retracted
    for b, *entry in zip(past.row_R, past.position_R, past.token_R, past.born_R, past.died_R, strict=True):
        lives[int(b)].add(tuple(map(int, entry)))
    rows = zip(trajectory.tokens_BL.tolist(), trajectory.born_BL.tolist(), lives, strict=True)
    return [(tuple(t), tuple((i, x) for i, x in enumerate(born) if x >= 0), frozenset(r)) for t, born, r in rows]


@pytest.mark.parametrize("name", CASES)
def test_denoise_samples_the_enumerated_distribution(retractions: ModuleType, worlds: dict, name: str) -> None:
    """20,000 rollouts: frequencies within 4 standard errors, recorded log-probs equal to the enumerated ones."""
    (toy, case, paths), rows = worlds[name, 0], 20_000
    trajectory = rollouts(toy, case, rows)
    trajectory.validate()
    index = {path.key: n for n, path in enumerate(paths)}
    path_B = torch.tensor([index[key] for key in keys_of(trajectory)])
    probability = torch.stack([path.probability for path in paths]).detach()
    expected, found = probability * rows, torch.bincount(path_B, minlength=len(paths))
    # Pearson's statistic over cells of at least 5 expected rollouts, against its mean + 4 standard deviations.
    large = expected >= 5
    statistic = ((found - expected).square() / expected)[large].sum().item()
    assert statistic <= large.sum() + 4 * (2 * large.sum()) ** 0.5
    exact = retractions.record(paths, case, PROMPT).select(path_B)
    torch.testing.assert_close(trajectory.logprob_BL.double(), exact.logprob_BL, rtol=0, atol=1e-6)
    if case.order == "sampled":
        found_BS, exact_BS = trajectory.choice_logprob_BS.double(), exact.choice_logprob_BS
        torch.testing.assert_close(found_BS, exact_BS[:, : found_BS.shape[1]], rtol=0, atol=1e-6)
    # Taken-back tokens with their log-probs, in any order inside a rollout.
    drawn, wanted = trajectory.actions("all"), exact.actions("all")
    for name_K in ("row_K", "position_K", "step_K", "token_K"):
        assert torch.equal(getattr(drawn, name_K), getattr(wanted, name_K)), name_K
    torch.testing.assert_close(drawn.logprob_K.double(), wanted.logprob_K, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_static_shapes_change_nothing(worlds: dict, name: str) -> None:
    toy, case, _ = worlds[name, 1]
    free, static = (rollouts(toy, case, 300, static=static) for static in (False, True))
    for field in ("tokens_BL", "born_BL", "rank_BL", "source_BL", "steps_B", "logprob_BL"):
        assert torch.equal(getattr(free, field), getattr(static, field)), field
    for one, other in zip(free.retracted, static.retracted, strict=True):
        assert torch.equal(one, other)
    if free.choice_logprob_BS is not None:
        steps = free.choice_logprob_BS.shape[1]
        torch.testing.assert_close(static.choice_logprob_BS[:, :steps], free.choice_logprob_BS, rtol=0, atol=1e-9)
