"""Advantages by hand, and what every one of them satisfies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import advantages  # noqa: F401 (importing registers the parts)

NAN = math.nan
# Two groups in mixed order: group 7 has rewards 1, 0, 0, 1, 1 and one that does not apply; group 2 has 3 and 5.
REWARD = torch.tensor([1.0, 3.0, 0.0, NAN, 0.0, 5.0, 1.0, 1.0])
GROUP = torch.tensor([7, 2, 7, 7, 7, 2, 7, 7])


def advantage(name: str, reward_B: Tensor = REWARD, group_B: Tensor = GROUP, **knobs: object) -> Tensor:
    return SLOTS["advantage"].build({"name": name, **knobs})(reward_B, group_B)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True, rtol=0, atol=1e-6)


def test_group_mean_by_hand() -> None:
    close(advantage("group_mean"), [0.4, -1.0, -0.6, NAN, -0.6, 1.0, 0.4, 0.4])


def test_group_std_by_hand() -> None:
    """Group 7: squares sum to 1.2, sample std sqrt(1.2 / 4), population std sqrt(1.2 / 5); group 2: sqrt(2) and 1."""
    s, r = math.sqrt(0.3), math.sqrt(2)
    sample = [0.4 / s, -1 / r, -0.6 / s, NAN, -0.6 / s, 1 / r, 0.4 / s, 0.4 / s]
    close(advantage("group_std", eps=0.0), sample)
    p = math.sqrt(0.24)
    close(advantage("group_std", eps=0.0, sample=False), [0.4 / p, -1, -0.6 / p, NAN, -0.6 / p, 1, 0.4 / p, 0.4 / p])
    close(advantage("group_std", eps=0.5)[:2], [0.4 / (s + 0.5), -1 / (r + 0.5)])


def test_leave_one_out_by_hand() -> None:
    """The others of a 1 in group 7 have mean 2/4, those of a 0 mean 3/4: n / (n - 1) times group_mean."""
    close(advantage("leave_one_out"), [0.5, -2.0, -0.75, NAN, -0.75, 2.0, 0.5, 0.5])


def test_batch_std_by_hand() -> None:
    """Centred in each group, 0.4 -1 -0.6 -0.6 1 0.4 0.4, divided by one standard deviation of all seven."""
    std = math.sqrt((3 * 0.16 + 2 * 1.0 + 2 * 0.36) / 6)
    expected = [value / std for value in (0.4, -1.0, -0.6, NAN, -0.6, 1.0, 0.4, 0.4)]
    close(advantage("batch_std", eps=0.0), expected)


def test_softmax_pair_by_hand() -> None:
    """Group 2 has A = -1 and 1: softmax(A) - softmax(-A) = -+tanh(1), times its two rows; NaN rows have no share."""
    found = advantage("softmax_pair")
    assert found[[1, 5]].tolist() == pytest.approx([-2 * math.tanh(1), 2 * math.tanh(1)])
    up, down = math.exp(0.4), math.exp(-0.6)
    plus, minus = up / (3 * up + 2 * down), (1 / up) / (3 / up + 2 / down)
    assert found[0].item() == pytest.approx(5 * (plus - minus))
    assert advantage("softmax_pair", temperature=1e-3)[[1, 5]].tolist() == pytest.approx([-2, 2])
    with pytest.raises(RecipeError, match=r"advantage\.temperature: 0\.0"):
        advantage("softmax_pair", temperature=0.0)


@pytest.mark.parametrize("name", list(SLOTS["advantage"]))
class TestEvery:
    def test_groups_sum_to_zero(self, name: str) -> None:
        rng = torch.Generator().manual_seed(0)
        group_B = torch.randint(0, 9, (200,), generator=rng)
        reward_B = torch.randn(200, generator=rng)
        reward_B[::7] = NAN
        found = advantage(name, reward_B, group_B)
        assert torch.equal(found.isnan(), reward_B.isnan())
        for group in group_B.unique():
            assert abs(found[group_B == group].nansum().item()) <= 1e-5

    def test_equal_rewards_give_exactly_zero(self, name: str) -> None:
        """0.1 is no binary fraction; a residue of the mean would cost a forward and, divided by a std of 0, explode."""
        for knobs in [{}, {"eps": 0.0}] if name == "group_std" else [{}]:
            found = advantage(name, torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long), **knobs)
            assert not found.any()

    def test_a_group_of_one_has_advantage_zero(self, name: str) -> None:
        found = advantage(name, torch.tensor([2.5, 1.0, NAN, NAN]), torch.tensor([0, 1, 1, 2]))
        close(found, [0.0, 0.0, NAN, NAN])

    def test_order_and_names_of_groups_do_not_matter(self, name: str) -> None:
        order = torch.randperm(len(REWARD), generator=torch.Generator().manual_seed(3))
        found = advantage(name, REWARD[order], 1000 - GROUP[order])
        torch.testing.assert_close(found, advantage(name)[order], equal_nan=True)

    def test_infinite_rewards_and_wrong_shapes_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="the reward of row 1 is inf"):
            advantage(name, torch.tensor([0.0, math.inf]), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            advantage(name, torch.zeros(2), torch.zeros(3, dtype=torch.long))


def test_a_negative_eps_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"advantage.eps: -1"):
        advantage("group_std", eps=-1.0)
