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
