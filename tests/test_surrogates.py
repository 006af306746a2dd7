"""Surrogates and divergences by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import divergences, surrogates  # noqa: F401 (importing registers the parts)

# (ratio, advantage, loss, dloss / dlog ratio) of ppo_clip with low 0.2, high 0.3
CLIPPED = [
    (1.0, 2.0, -2.0, -2.0),
    (1.25, 2.0, -2.5, -2.5),
    (1.5, 2.0, -2.6, 0.0),
    (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.5, -2.0, 3.0, 3.0),
    (0.9, -2.0, 1.8, 1.8),
    (0.5, -2.0, 1.6, 0.0),
    (0.5, 0.0, 0.0, 0.0),
]


def loss_and_slope(choice: object, ratio: float, advantage: float) -> tuple[float, float]:
    log_ratio_U = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = SLOTS["surrogate"].build(choice)(log_ratio_U, torch.tensor([advantage], dtype=torch.float64)).sum()
    return loss.item(), torch.autograd.grad(loss, log_ratio_U)[0].item()


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIPPED)
def test_ppo_clip_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    found = loss_and_slope({"name": "ppo_clip", "low": 0.2, "high": 0.3}, ratio, advantage)
    assert found == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 2.0), (3.0, -0.5), (0.1, 1.5)])
def test_importance_by_hand(ratio: float, advantage: float) -> None:
    assert loss_and_slope("importance", ratio, advantage) == pytest.approx((-ratio * advantage,) * 2, abs=1e-12)


def test_ppo_clip_is_the_textbook_minimum() -> None:
    rng = torch.Generator().manual_seed(0)
    log_ratio_U, advantage_U = torch.randn(2, 10_000, generator=rng, dtype=torch.float64)
    ratio_U = log_ratio_U.exp()
    expected = -torch.minimum(ratio_U * advantage_U, ratio_U.clamp(0.7, 1.1) * advantage_U)
    found = SLOTS["surrogate"].build({"name": "ppo_clip", "low": 0.3, "high": 0.1})(log_ratio_U, advantage_U)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_clipped_unit_has_gradient_zero_even_where_the_ratio_overflows() -> None:
    log_ratio_U = torch.tensor([5000.0, -5000.0], requires_grad=True)
    loss_U = SLOTS["surrogate"].build("ppo_clip")(log_ratio_U, torch.tensor([1.0, -1.0]))
    loss_U.sum().backward()
    assert loss_U.tolist() == pytest.approx([-1.2, 0.8]) and log_ratio_U.grad.tolist() == [0.0, 0.0]
    # low: 1 leaves the ratio unbounded from below.
    wide = SLOTS["surrogate"].build({"name": "ppo_clip", "low": 1.0})(torch.tensor([-1.0]), torch.tensor([-1.0]))
    assert wide.item() == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("knobs", [{"low": 0.0}, {"low": 1.01}, {"high": 0.0}, {"high": math.inf}, {"low": math.nan}])
def test_impossible_clips_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=r"surrogate\.(low|high)"):
        SLOTS["surrogate"].build({"name": "ppo_clip", **knobs})(torch.zeros(1), torch.zeros(1))


def test_dual_clip_bounds_what_a_bad_unit_can_cost() -> None:
    """As ppo_clip, but for A < 0 the ratio counts 3 at most, with gradient 0 beyond."""
    choice = {"name": "dual_clip", "low": 0.2, "high": 0.3, "ceiling": 3.0}
    for ratio, advantage, loss, slope in CLIPPED:
        assert loss_and_slope(choice, ratio, advantage) == pytest.approx((loss, slope), abs=1e-12)
    assert loss_and_slope(choice, 2.9, -2.0) == pytest.approx((5.8, 5.8), abs=1e-12)
    assert loss_and_slope(choice, 50.0, -2.0) == pytest.approx((6.0, 0.0), abs=1e-12)


def test_cispo_weighs_by_a_bounded_ratio_and_never_drops_a_unit() -> None:
    choice = {"name": "cispo", "high": 1.28}
    assert loss_and_slope(choice, 0.5, 2.0) == pytest.approx((-0.5 * 2 * math.log(0.5), -1.0), abs=1e-12)
    assert loss_and_slope(choice, 4.0, 2.0) == pytest.approx((-1.28 * 2 * math.log(4), -2.56), abs=1e-12)
    assert loss_and_slope(choice, 4.0, -1.0)[1] == pytest.approx(1.28, abs=1e-12)


def test_linear_bound_is_finite_below_the_ratio_and_tangent_at_one() -> None:
    """P10: 1 + D directly; -A (1 + D) bounds -A exp(D) from above for A >= 0, and equals it with its slope at D = 0."""
    for advantage in (2.0, -2.0):
        assert loss_and_slope("linear_bound", 1.0, advantage) == pytest.approx((-advantage, -advantage), abs=1e-12)
    for log_ratio in (-30.0, -1.0, -0.5, 0.7, 5.0):
        leaf_U = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
        good_U = SLOTS["surrogate"].build("linear_bound")(leaf_U, torch.ones(1, dtype=torch.float64))
        assert good_U.item() == pytest.approx(-(1 + log_ratio)) and good_U.item() >= -math.exp(log_ratio)
        bad_U = SLOTS["surrogate"].build("linear_bound")(leaf_U, -torch.ones(1, dtype=torch.float64))
        assert bad_U.item() == pytest.approx(min(math.exp(log_ratio), 3.0))


def test_weighted_likelihood_is_linear() -> None:
    assert loss_and_slope("weighted_likelihood", 0.25, 2.0) == pytest.approx((-2 * math.log(0.25), -2.0), abs=1e-12)


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"name": "dual_clip", "ceiling": 1.1}, "surrogate.ceiling: 1.1"),
        ({"name": "cispo", "high": 0.0}, "surrogate.high: 0.0"),
        ({"name": "linear_bound", "ceiling": 1.0}, "surrogate.ceiling: 1.0"),
    ],
)
def test_impossible_bounds_are_refused(choice: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        SLOTS["surrogate"].build(choice)(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(("name", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_divergences_by_hand(name: str, value: float) -> None:
    """log p = -1, log p_ref = -1.5."""
    found = SLOTS["divergence"].build(name)(torch.tensor([-1.0]), torch.tensor([-1.5]))
    assert found.item() == pytest.approx(value, rel=1e-5)


def expectations(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (E_p[k], E_p[dk/dz], KL(p, ref), dKL(p, ref)/dz, dKL(ref, p)/dz) for p = softmax(z) over five tokens."""
    rng = torch.Generator().manual_seed(1)
    z, reference = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    z.requires_grad_()
    logp, logr = z.log_softmax(0), reference.log_softmax(0)
    k_V = SLOTS["divergence"].build(name)(logp, logr)
    p, r = logp.exp(), logr.exp()
    mean, kl, reverse = (p.detach() * k_V).sum(), (p * (logp - logr)).sum(), (r * (logr - logp)).sum()
    slopes = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (mean, kl, reverse)]
    return mean.detach(), slopes[0], kl.detach(), slopes[1], slopes[2]


def test_what_the_divergences_estimate_and_what_their_gradients_descend() -> None:
    """k1 and k3 have the KL's value; the gradient of k1 is 0, that of k2 the KL's, that of k3 the reverse KL's."""
    for name in ("k1", "k3"):
        mean, _, kl, _, _ = expectations(name)
        torch.testing.assert_close(mean, kl)
    _, slope, _, _, _ = expectations("k1")
    torch.testing.assert_close(slope, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    _, slope, _, forward, _ = expectations("k2")
    torch.testing.assert_close(slope, forward)
    _, slope, _, _, reverse = expectations("k3")
    torch.testing.assert_close(slope, reverse)
