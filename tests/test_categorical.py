"""Categorical draws and log-probabilities against exact distributions, at the edges and where fp32 saturates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.rollouts.categorical import CHUNK, best_logprob, draw, log_odds, log_probs
from unmask.rollouts.noise import uniform

SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53


def logits(rows: int, vocabulary: int, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def odds_64(logp_KV: Tensor) -> Tensor:
    """Return log p - log(1 - p) in float64, 1 - p being the sum of the other tokens' probabilities, one by one."""
    logp_KV = logp_KV.double()
    columns = []
    for v in range(logp_KV.shape[1]):
        others_KV = logp_KV.clone()
        others_KV[:, v] = -torch.inf
        columns.append(logp_KV[:, v] - others_KV.logsumexp(dim=1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    """Pearson's statistic of 100,000 draws over 40 tokens, below its mean + 5 standard deviations."""
    count, vocabulary = 100_000, 40
    logits_V = logits(1, vocabulary, 1.5)[0]
    expected_V = count * (logits_V.double() / temperature).softmax(dim=0)
    logp_V = log_probs(logits_V[None], temperature=temperature)
    token_K = draw(logp_V.expand(count, -1), uniform(3, "draw", 0, torch.arange(count)))
    found_V = torch.bincount(token_K, minlength=vocabulary)
    statistic = ((found_V - expected_V).square() / expected_V).sum().item()
    assert statistic <= vocabulary - 1 + 5 * math.sqrt(2 * (vocabulary - 1))
    if temperature != 1.0:  # and the test can tell the temperatures apart
        other_V = count * logits_V.double().softmax(dim=0)
        assert ((found_V - other_V).square() / other_V).sum().item() > 1000


@pytest.mark.parametrize("vocabulary", [6, CHUNK, 3 * CHUNK])
def test_draws_on_the_borders_between_tokens(vocabulary: int) -> None:
    """n tokens of mass 1 between dead ones: u = i/n is exactly the end of token i - 1, so that token i is drawn."""
    alive = torch.arange(1, vocabulary - 1, 3)
    alive = alive[: 2 ** int(math.log2(len(alive)))]
    logp_V = torch.full((vocabulary,), -torch.inf)
    logp_V[alive] = 0.0
    index_K = torch.arange(0, len(alive), max(1, len(alive) // 128))
    index_K = torch.cat([index_K, torch.searchsorted(alive, torch.tensor([CHUNK - 1, CHUNK, 2 * CHUNK]))])
    index_K = index_K[index_K < len(alive)]
    for offset in (0.0, 0.5):
        token_K = draw(logp_V.expand(len(index_K), -1), (index_K + offset).double() / len(alive))
        assert torch.equal(token_K, alive[index_K])


def test_draws_at_the_ends_stay_inside_the_vocabulary() -> None:
    """Where the sums of a chunk in two orders differ in the last bit, the last likely token is drawn."""
    logits_KV = logits(400, CHUNK - 7, 3.0)
    logits_KV[:, -2:] = -torch.inf
    logp_KV = log_probs(logits_KV)
    assert (draw(logp_KV, torch.full((400,), LARGEST, dtype=torch.float64)) == CHUNK - 10).all()
    assert (draw(logp_KV, torch.full((400,), SMALLEST, dtype=torch.float64)) == 0).all()


def test_draws_are_exact_quantiles() -> None:
    """At u = (i + 1/2) / N the first v of 300 tokens are drawn N F(v) times, up to one."""
    count = 50_000
    logits_V = logits(1, 300, 1.0)[0]
    reach_V = logits_V.double().softmax(dim=0).cumsum(dim=0)
    grid_K = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token_K = draw(log_probs(logits_V[None]).expand(count, -1), grid_K)
    drawn_V = torch.bincount(token_K, minlength=300).cumsum(dim=0)
    assert (drawn_V - count * reach_V).abs().max().item() <= 1.1


def test_draws_of_a_large_vocabulary_are_the_exact_quantiles() -> None:
    """At u = (i + 1/2) / N the first v tokens are drawn N F(v) times, up to one: bulk, tail and every chunk border."""
    vocabulary, count, rows = 100_000, 500, 100
    # Zipf's law, with the likely tokens scattered: a fifth of the mass lies on tokens below 1e-5.
    order_V = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    logits_V = -(order_V.double() + 1).log()
    reach_V = logits_V.softmax(dim=0).cumsum(dim=0)
    logp_KV = log_probs(logits_V.float()[None]).expand(rows, -1)
    grid_K = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token_K = torch.cat([draw(logp_KV, part_K) for part_K in grid_K.split(rows)])
    drawn_V = torch.bincount(token_K, minlength=vocabulary).cumsum(dim=0)
    assert (drawn_V - count * reach_V).abs().max().item() <= 1.0
    tail_V = logits_V.softmax(dim=0) < 1e-5
    share = tail_V[token_K].double().mean().item()
    assert share == pytest.approx(logits_V.softmax(dim=0)[tail_V].sum().item(), abs=0.05)
    assert share > 0.15


@pytest.mark.parametrize("vocabulary", [5, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_tokens_of_probability_zero_are_never_drawn(vocabulary: int) -> None:
    """Dead tokens at both ends, in between, and a whole dead chunk; u at its ends and exactly on every border."""
    logits_V = logits(1, vocabulary, 1.0)[0]
    logits_V[:2] = logits_V[-1] = -torch.inf
    if vocabulary > 2 * CHUNK:
        logits_V[CHUNK : 2 * CHUNK] = -torch.inf
        logits_V[2 * CHUNK + 1 :: 2] = -torch.inf
    alive = logits_V.isfinite().nonzero().squeeze(1)
    logp_V = log_probs(logits_V[None])[0]
    borders_K = logp_V.exp().double().cumsum(dim=0)[alive[:: max(1, len(alive) // 50)]]
    edges_K = torch.cat([torch.tensor([SMALLEST, 0.5, LARGEST], dtype=torch.float64), borders_K]).clamp(max=LARGEST)
    token_K = draw(logp_V.expand(len(edges_K), -1), edges_K)
    assert logp_V[token_K].isfinite().all()
    assert token_K[0] == alive[0]
    assert token_K[2] == alive[-1]


def test_a_certain_token_is_drawn_at_every_u() -> None:
    u_K = torch.tensor([SMALLEST, 0.3, LARGEST], dtype=torch.float64)
    for token in (0, 3, CHUNK, 2 * CHUNK + 5):
        logits_V = torch.full((2 * CHUNK + 6,), -torch.inf)
        logits_V[token] = -40.0
        assert draw(log_probs(logits_V[None]).expand(3, -1), u_K).tolist() == [token] * 3


def test_banned_tokens_have_no_probability_and_are_never_drawn() -> None:
    logits_KV = logits(1, 6, 1.0).expand(1_000, -1).clone()
    logits_KV[:, 2] = 50.0
    logp_KV = log_probs(logits_KV, banned=(2, 5))
    assert torch.equal(logp_KV[0].isinf(), torch.tensor([False, False, True, False, False, True]))
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(logp_KV[:, kept], logits_KV[:, kept].log_softmax(dim=1))
    assert set(draw(logp_KV, uniform(0, "draw", 0, torch.arange(1_000))).tolist()) == set(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probs_are_those_of_float64(temperature: float) -> None:
    logits_KV = logits(20, 300, 12.0)
    exact_KV = (logits_KV.double() / temperature).log_softmax(dim=1)
    torch.testing.assert_close(
        log_probs(logits_KV, temperature=temperature).double(), exact_KV, rtol=1e-6, atol=2e-5 / temperature
    )
    assert torch.equal(log_probs(logits_KV.double(), temperature=temperature), exact_KV)


def test_log_probs_of_bfloat16_logits_are_fp32_and_leave_their_argument() -> None:
    logits_KV = logits(4, 50, 5.0).bfloat16()
    kept_KV = logits_KV.clone()
    logp_KV = log_probs(logits_KV, banned=(1,))
    assert logp_KV.dtype == torch.float32
    assert torch.equal(logits_KV, kept_KV)
    assert logp_KV.exp().sum(dim=1).sub(1).abs().max().item() < 1e-6


def test_log_probs_are_differentiable_with_banned_tokens() -> None:
    """d log p_a / d logit_v = ([v = a] - p_v) / T, and 0 for a banned token."""
    logits_KV = logits(1, 5, 1.0).double().requires_grad_()
    log_probs(logits_KV, temperature=0.7, banned=(4,))[0, 1].backward()
    p_V = (logits_KV.detach()[0, :4] / 0.7).softmax(dim=0)
    expected_V = torch.cat([(torch.tensor([0.0, 1.0, 0.0, 0.0]) - p_V) / 0.7, torch.zeros(1)])
    torch.testing.assert_close(logits_KV.grad[0], expected_V.double())


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
def test_log_odds_are_those_of_float64(scale: float) -> None:
    logp_KV = log_probs(logits(30, 25, scale))
    torch.testing.assert_close(log_odds(logp_KV).double(), odds_64(logp_KV), rtol=1e-5, atol=1e-5)


def test_log_odds_do_not_tie_where_probabilities_do() -> None:
    """Lead 20 ... 80 nats before 9 other tokens: p is 1.0 in fp32 for all, the odds are lead - log 9."""
    lead_K = torch.arange(20.0, 81.0)
    logits_KV = torch.zeros(len(lead_K), 10)
    logits_KV[:, 3] = lead_K
    logp_KV = log_probs(logits_KV)
    assert (logp_KV.exp()[:, 3] == 1).all()
    torch.testing.assert_close(log_odds(logp_KV)[:, 3], lead_K - math.log(9))


def test_log_odds_of_two_equally_likely_tokens_are_zero() -> None:
    odds_KV = log_odds(log_probs(torch.tensor([[3.0, 3.0, -torch.inf]])))
    torch.testing.assert_close(odds_KV, torch.tensor([[0.0, 0.0, -torch.inf]]))


def test_log_odds_of_the_only_token_are_infinite() -> None:
    assert log_odds(log_probs(torch.tensor([[0.0, -torch.inf]]))).tolist() == [[torch.inf, -torch.inf]]
    assert best_logprob(log_probs(torch.tensor([[0.0, -torch.inf]]))).tolist() == [0.0]


def test_best_log_probability_is_precise_where_fp32_rounds_to_one() -> None:
    """log p = -log(1 + 9 exp(-lead)), from 1e-7 down to 1e-26, relative to itself."""
    lead_K = torch.arange(-3.0, 62.0, 0.5)
    logits_KV = torch.zeros(len(lead_K), 10)
    logits_KV[:, 0] = lead_K
    exact_K = -torch.log1p(9 * torch.exp(-lead_K.double()))
    negative = lead_K < 0
    exact_K[negative] = -torch.log(9 + torch.exp(lead_K[negative].double()))
    torch.testing.assert_close(best_logprob(log_probs(logits_KV)).double(), exact_K, rtol=2e-5, atol=0)
