"""The trace estimator: its views by hand, unbiased subsampling, and the weights of ragged trajectories."""

from __future__ import annotations

import itertools
from collections import Counter
from types import ModuleType

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import weights  # noqa: F401 (importing registers the parts)
from unmask.rl.estimators import trace
from unmask.rl.objective import build_objective
from unmask.rollouts.trajectory import GIVEN, PAD, SAMPLED, Trajectory

M, E = 9, 8  # mask and EOS


def trajectory(tokens: list[list[int]], born: list[list[int]]) -> Trajectory:
    """Return a trajectory by hand; a decided token that no step committed was given."""
    tokens_BL, born_BL = torch.tensor(tokens), torch.tensor(born, dtype=torch.int16)
    source_BL = torch.where(tokens_BL == M, PAD, torch.where(born_BL >= 0, SAMPLED, GIVEN)).to(torch.int8)
    rows = len(tokens)
    made = Trajectory(
        prompt_BQ=torch.zeros(rows, 1, dtype=torch.long),
        prompt_mask_BQ=torch.ones(rows, 1, dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=born_BL,
        logprob_BL=torch.where(born_BL >= 0, -0.5, 0.0),
        steps_B=born_BL.amax(1).long() + 1,
        rollout_id_B=torch.arange(rows),
        temperature=1.0,
        mask_token_id=M,
        eos_token_ids=(E,),
    )
    made.validate()
    return made


# Row 0: 3 steps of 2, 1 and 2 tokens; the last two tokens, of steps 0 and 2, lie behind the EOS of step 1.
# Row 1: a given token, steps 0 and 3 (1 and 2 had nothing), an undecided tail. Row 2: everything given.
RAGGED = trajectory(
    [[1, 2, E, 4, 5], [1, 2, 3, E, M], [1, 2, 3, 4, 5]],
    [[2, 0, 1, 0, 2], [0, -1, 3, 3, -1], [-1, -1, -1, -1, -1]],
)


def test_views_by_hand() -> None:
    views = trace(RAGGED, rng=None)
    assert views.row_N.tolist() == [0, 0, 0, 1, 1]
    assert views.step_N.tolist() == [0, 1, 2, 0, 3]
    assert views.view_K.tolist() == [0, 1, 2, 3, 4, 4]
    assert views.position_K.tolist() == [1, 2, 0, 0, 2, 3]
    assert views.target_K.tolist() == [2, E, 1, 1, 3, E]
    assert views.count_B.tolist() == [3, 3, 0] and views.views_B.tolist() == [3, 2, 0]
    assert views.inclusion_N.tolist() == [1.0] * 5
    assert views.canvas().tolist() == [
        [M, M, M, M, M],
        [M, 2, M, 4, M],
        [M, 2, E, 4, M],
        [M, 2, M, M, M],
        [1, 2, M, M, M],
    ]
    assert views.scored().nonzero().tolist() == [[0, 1], [1, 2], [2, 0], [3, 0], [4, 2], [4, 3]]


def test_all_tokens_are_scored_behind_eos_too() -> None:
    views = trace(RAGGED, rng=None, tokens="all")
    assert views.view_K.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    assert views.position_K.tolist() == [1, 3, 2, 0, 4, 0, 2, 3]
    assert views.count_B.tolist() == [5, 3, 0]


def test_steps_that_commit_no_action_are_no_views() -> None:
    late = trajectory([[1, E, 3, 4]], [[1, 0, 2, 3]])
    assert trace(late, rng=None).step_N.tolist() == [0, 1]
    assert trace(late, rng=None, tokens="all").step_N.tolist() == [0, 1, 2, 3]


def test_parts_are_slices() -> None:
    views = trace(RAGGED, rng=None, tokens="all")
    part = views.part(1, 4)
    assert part.row_N.tolist() == [0, 0, 1] and part.step_N.tolist() == [1, 2, 0]
    assert part.view_K.tolist() == [0, 1, 1, 2] and part.position_K.tolist() == [2, 0, 4, 0]
    kept = views.where(torch.tensor([True, False, True, False, True]))
    assert kept.row_N.tolist() == [0, 0, 1] and kept.view_K.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(kept.canvas(), views.canvas()[[0, 2, 4]])


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"steps": "all", "k": 2}, "k: 2 has no effect"),
        ({"steps": "uniform_k"}, "k: None must be at least 1"),
        ({"steps": "uniform_k", "k": 0}, "k: 0 must be at least 1"),
        ({"steps": "some"}, "'some' is not one of all, uniform_k"),
    ],
)
def test_contradictory_knobs_are_refused(knobs: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        trace(RAGGED, rng=None, **knobs)


def test_uniform_k_keeps_k_steps_of_each_rollout_evenly() -> None:
    """4,000 rollouts of 4 steps: each of the 6 pairs of steps within 4 standard errors of 1/6."""
    rows = 4000
    many = trajectory([[1, 2, 3, 4]] * rows, [[3, 0, 2, 1]] * rows)
    views = trace(many, rng=torch.Generator().manual_seed(0), steps="uniform_k", k=2)
    assert views.inclusion_N.unique().tolist() == [0.5]
    assert torch.equal(views.row_N, torch.arange(rows).repeat_interleave(2))
    pairs = Counter(map(tuple, views.step_N.view(rows, 2).tolist()))
    assert set(pairs) == set(itertools.combinations(range(4), 2))
    assert all(abs(n / rows - 1 / 6) <= 4 * (5 / 36 / rows) ** 0.5 for n in pairs.values())


def test_uniform_k_is_keyed_by_rollout_id() -> None:
    """The same steps whatever else is in the batch and in whatever order; another generator draws others."""
    many = trajectory([[1, 2, 3, 4]] * 20, [[3, 0, 2, 1]] * 20)

    def chosen(part: Trajectory, seed: int) -> dict[int, list[int]]:
        views = trace(part, rng=torch.Generator().manual_seed(seed), steps="uniform_k", k=2)
        ids = part.rollout_id_B[views.row_N].tolist()
        return {i: [s for j, s in zip(ids, views.step_N.tolist(), strict=True) if i == j] for i in ids}

    whole, order = chosen(many, 0), torch.tensor([7, 3, 19])
    assert chosen(many.select(order), 0) == {i: whole[i] for i in order.tolist()}
    assert chosen(many, 1) != whole


def test_uniform_k_with_few_steps_keeps_them_all() -> None:
    views = trace(RAGGED, rng=torch.Generator(), steps="uniform_k", k=2)
    assert torch.bincount(views.row_N, minlength=3).tolist() == [2, 2, 0]
    expected = torch.where(views.row_N == 0, 2 / 3, 1.0)
    torch.testing.assert_close(views.inclusion_N, expected)
    assert views.count_B.tolist() == [3, 3, 0] and views.views_B.tolist() == [3, 2, 0]


@pytest.mark.parametrize("name", ["confidence_2", "sampled_1"])
@pytest.mark.parametrize(
    ("unit", "bound", "weight", "distance"),
    [
        ("token", "sum", "uniform", 0.3),
        ("token", "sum", "per_step_mean", 0.3),
        ("step", "sum", "per_step_mean", 0.3),
        ("step", "mean", "uniform", 0.3),
        # A ratio over a whole rollout is no sum over steps; its gradient is unbiased on policy.
        ("rollout", "sum", "per_step_mean", 0.0),
        ("rollout", "mean", "uniform", 0.0),
    ],
)
def test_expected_gradient_of_uniform_k_is_the_full_gradient(
    toys: ModuleType,
    onegraph: ModuleType,
    name: str,
    unit: str,
    bound: str,
    weight: str,
    distance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mean over all subsets, enumerated by replacing the noise that ranks the steps."""
    w = onegraph.world(toys, name, distance=distance)
    four = torch.tensor([0, 1, 2, 4])
    part, advantage_B = w.trajectory.select(four), w.advantage_B[four]

    def gradient(**estimator: object) -> Tensor:
        section = {
            "estimator": {"name": "trace", "tokens": "all", **estimator},
            "unit": unit,
            "bound": bound,
            "weight": weight,
        }
        chosen = build_objective({**section, "surrogate": "importance"})
        rng = torch.Generator()
        plan = chosen.plan(w.policy, None, part, advantage_B, rng=rng, sampler=w.sampler)
        chosen.backward(w.policy, plan)
        return w.policy.gradient()

    full = trace(part, rng=None, tokens="all")
    steps = [full.step_N[full.row_N == b].tolist() for b in range(4)]
    k = 1 if name == "confidence_2" else 2
    found, subsets = torch.zeros_like(w.policy.gradient()), 0
    for kept in itertools.product(*[list(itertools.combinations(s, min(k, len(s)))) for s in steps]):
        ranks = {(four[b].item(), t): float(t not in kept[b]) for b in range(4) for t in steps[b]}

        def noise(seed: int, purpose: str, step: int, id_N: Tensor, step_N: Tensor, ranks=ranks) -> Tensor:
            pairs = zip((id_N - 100).tolist(), step_N.tolist(), strict=True)
            return torch.tensor([ranks[pair] for pair in pairs], dtype=torch.float64)

        monkeypatch.setattr("unmask.rl.estimators.uniform", noise)
        found, subsets = found + gradient(steps="uniform_k", k=k), subsets + 1
    exact = gradient()
    assert subsets > 4
    assert ((found / subsets - exact).norm() / exact.norm()).item() <= 1e-6


def test_uniform_weights_by_hand() -> None:
    weight_K, mass_B = SLOTS["weight"].build("uniform")(trace(RAGGED, rng=None))
    assert weight_K.tolist() == [1.0] * 6 and mass_B.tolist() == [3.0, 3.0, 0.0]


def test_per_step_mean_weights_by_hand() -> None:
    """1 / (n_{b,t} S_b): row 0 has 3 steps of 2, 1 and 2 tokens, row 1 steps of 1 and 2, row 2 none."""
    weight_K, mass_B = SLOTS["weight"].build("per_step_mean")(trace(RAGGED, rng=None, tokens="all"))
    expected = [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6, 1 / 2, 1 / 4, 1 / 4]
    torch.testing.assert_close(weight_K, torch.tensor(expected))
    assert mass_B.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", [n for n in SLOTS["weight"] if not hasattr(SLOTS["weight"].get(n), "scaled")])
def test_weights_sum_to_the_mass(name: str) -> None:
    """Exactly with all steps; over all subsets on average, which is what the denominator stands for."""
    views = trace(RAGGED, rng=None, tokens="all")
    weight_K, mass_B = SLOTS["weight"].build(name)(views)
    torch.testing.assert_close(torch.zeros(3).index_add(0, views.row_K, weight_K), mass_B)
    total, draws = torch.zeros(3), 3000
    many = trajectory(RAGGED.tokens_BL.tolist(), RAGGED.born_BL.tolist())
    rng = torch.Generator().manual_seed(0)
    for _ in range(draws):
        part = trace(many, rng=rng, steps="uniform_k", k=1, tokens="all")
        weight_K, mass_k_B = SLOTS["weight"].build(name)(part)
        assert torch.equal(mass_k_B, mass_B)
        total = total.index_add(0, part.row_K, weight_K)
    torch.testing.assert_close(total / draws, mass_B, rtol=0.03, atol=0)
