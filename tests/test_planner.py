"""Planner distributions by enumeration, networks by size and an independent computation, files by reading back."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor

from unmask.policies.planner import FEATURES, Planner, PlannerSpec, fingerprint_of, load_planner, new_planner
from unmask.policies.planner_distributions import Bernoulli, Categorical, Count, Distribution, Noise, PlackettLuce
from unmask.recipes.registry import RecipeError
from unmask.rollouts.noise import uniform

KINDS = ("bernoulli_sampled", "bernoulli_argmax", "bernoulli_none", "plackett_luce", "count", "categorical")


def made(kind: str, logit_BL: Tensor, candidate_BL: Tensor, count_BC: Tensor | None = None) -> Distribution:
    if kind.startswith("bernoulli"):
        return Bernoulli(logit_BL, candidate_BL, kind.partition("_")[2])
    if kind == "plackett_luce":
        return PlackettLuce(logit_BL, candidate_BL)
    if kind == "categorical":
        return Categorical(logit_BL, candidate_BL)
    counts = logit_BL.new_tensor([[0.3, -0.2, 0.9]]).expand(len(logit_BL), 3) if count_BC is None else count_BC
    return Count(logit_BL, candidate_BL, counts, (1, 2, 4))


def logits(length: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(1, length, dtype=torch.float64, generator=rng)


def outcomes(kind: str, candidates: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Return every outcome as rows of (chosen, rank): sets for bernoulli, ordered draws otherwise."""
    chosen, rank = [], []
    for size in range(len(candidates) + 1):
        subsets = itertools.combinations if kind.startswith("bernoulli") else itertools.permutations
        for order in subsets(candidates, size):
            chosen.append([place in order for place in range(length)])
            rank.append([order.index(place) if place in order else -1 for place in range(length)])
    return torch.tensor(chosen), torch.tensor(rank)


def enumerated(kind: str, logit_1L: Tensor, candidate_1L: Tensor) -> tuple[Tensor, Tensor, Tensor, Distribution]:
    chosen_NL, rank_NL = outcomes(kind, candidate_1L[0].nonzero().squeeze(1).tolist(), logit_1L.shape[1])
    rows = len(chosen_NL)
    distribution = made(kind, logit_1L.expand(rows, -1), candidate_1L.expand(rows, -1))
    return distribution.log_prob(chosen_NL, rank_NL), chosen_NL, rank_NL, distribution


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_sum_to_one(kind: str, seed: int) -> None:
    candidate_1L = torch.tensor([[True, True, False, True, True]])
    logprob_N, chosen_NL, _, _ = enumerated(kind, logits(5, seed), candidate_1L)
    assert abs(logprob_N.exp().sum().item() - 1) < 1e-12
    if kind != "bernoulli_none":
        assert logprob_N[~chosen_NL.any(dim=1)].exp().item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_has_these_probabilities(kind: str) -> None:
    n, candidate_1L = 200_000, torch.tensor([[True, True, False, True]])
    logprob_N, chosen_NL, rank_NL, _ = enumerated(kind, logits(4, 1, 1.0), candidate_1L)
    row_B, place_L = torch.arange(n), torch.arange(4)
    noise = Noise(
        uniform(0, "a", 0, row_B[:, None], place_L),
        uniform(0, "b", 0, row_B[:, None], place_L),
        uniform(0, "c", 0, row_B),
    )
    draw = made(kind, logits(4, 1, 1.0).expand(n, -1), candidate_1L.expand(n, -1)).sample(noise)
    key_BL = torch.where(draw.chosen_BL, draw.key_BL, -torch.inf)
    rank_BL = (key_BL[:, None, :] > key_BL[:, :, None]).sum(dim=2)
    for outcome, logprob in enumerate(logprob_N):
        same_B = (draw.chosen_BL == chosen_NL[outcome]).all(dim=1)
        if not kind.startswith("bernoulli"):
            same_B &= (~draw.chosen_BL | (rank_BL == rank_NL[outcome])).all(dim=1)
        p = logprob.exp().item()
        # Four and a half standard errors: a false alarm in 10^5 outcomes.
        assert abs(same_B.double().mean().item() - p) <= 4.5 * math.sqrt(p * (1 - p) / n) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_that_of_the_outcomes(kind: str) -> None:
    candidate_1L = torch.tensor([[True, True, False, True, True]])
    logprob_N, chosen_NL, rank_NL, distribution = enumerated(kind, logits(5, 2), candidate_1L)
    p_N = logprob_N.exp()
    wanted = torch.special.entr(p_N).sum()
    # Where it is a sum along the draw, its mean is the entropy.
    found = (p_N * distribution.entropy(chosen_NL, rank_NL))[p_N > 0].sum()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str) -> None:
    candidate_BL = torch.tensor([[True, True, False, True]]).expand(3, -1)
    chosen_BL = torch.tensor([[True, False, False, True], [False, True, False, False], [True, True, False, True]])
    rank_BL = torch.tensor([[1, -1, -1, 0], [-1, 0, -1, -1], [2, 0, -1, 1]])
    keep_B = torch.tensor([kind != "categorical", True, kind not in ("categorical", "count")])

    def total(logit_BL: Tensor, count_BC: Tensor) -> Tensor:
        distribution = made(kind, logit_BL, candidate_BL, count_BC)
        return distribution.log_prob(chosen_BL, rank_BL)[keep_B].sum() + distribution.entropy(chosen_BL, rank_BL).sum()

    leaves = logits(4, 3).expand(3, -1).clone().requires_grad_(), logits(3, 4).expand(3, -1).clone().requires_grad_()
    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_and_rows_without_candidates_are_finite(kind: str) -> None:
    logit_BL = torch.tensor([[30.0, -30.0, 30.0], [-30.0, -30.0, -30.0], [0.0, 1.0, 2.0]], requires_grad=True)
    candidate_BL = torch.tensor([[True, True, True], [True, True, True], [False, False, False]])
    distribution = made(kind, logit_BL, candidate_BL)
    unit_BL = uniform(0, "x", 0, torch.arange(3)[:, None], torch.arange(3))
    draw = distribution.sample(Noise(unit_BL, unit_BL.flip(0), unit_BL[:, 0]))
    assert not draw.chosen_BL[2].any() and not distribution.mode().chosen_BL[2].any()
    rank_BL = (draw.key_BL[:, None, :] > draw.key_BL[:, :, None]).sum(dim=2)
    logprob_B, entropy_B = distribution.log_prob(draw.chosen_BL, rank_BL), distribution.entropy(draw.chosen_BL, rank_BL)
    assert logprob_B[2] == 0 and entropy_B[2] == 0
    assert logprob_B.isfinite().all() and (logprob_B <= 1e-6).all() and (entropy_B >= -1e-5).all()
    (logprob_B.sum() + entropy_B.sum()).backward()
    assert logit_BL.grad is not None and logit_BL.grad.isfinite().all()
    if kind.startswith("bernoulli"):
        assert draw.chosen_BL[0].tolist() == [True, False, True]


def test_the_forced_position_of_argmax_merges_with_its_draw() -> None:
    """P(e_k*) = prod over the others of (1 - s_j), from the definition."""
    logit_1L = torch.tensor([[0.4, 1.1, -0.3]], dtype=torch.float64)
    chosen_1L = torch.tensor([[False, True, False]])
    found = Bernoulli(logit_1L, torch.ones_like(chosen_1L), "argmax").log_prob(chosen_1L, chosen_1L.long())
    keep_L = 1 - torch.sigmoid(logit_1L[0])
    torch.testing.assert_close(found.exp().item(), (keep_L[0] * keep_L[2]).item())


PUBLISHED = PlannerSpec(features=("odds", "masked", "time"), time="published")


def test_the_published_size_and_start() -> None:
    planner = new_planner(PUBLISHED)
    assert sum(p.numel() for p in planner.network.parameters()) == 331_265
    rng = torch.Generator().manual_seed(0)
    open_L = torch.arange(64) % 2 == 0
    odds_BL = torch.rand(4, 64, generator=rng) * open_L  # as of decided positions
    seen = []
    for masked_L, time in itertools.product((open_L.float(), torch.ones(64)), (0.0, 0.7)):
        features = torch.stack([odds_BL, masked_L.expand_as(odds_BL), torch.full_like(odds_BL, time)], dim=2)
        seen.append(planner.network(features).logit_BL[:, open_L])
    assert all(torch.equal(logit_BL, seen[0]) for logit_BL in seen), "the condition's matrix starts at 0"
    assert 0.05 < torch.sigmoid(seen[0]).mean().item() < 0.25


def test_the_block_against_its_formulas() -> None:
    """The network in float64 against a loop over heads and positions."""
    planner = new_planner(PlannerSpec(width=8, heads=2, mlp=12, distribution="count"), seed=3)
    network = planner.network.double()
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=rng)
    features = torch.rand(2, 5, len(FEATURES), dtype=torch.float64, generator=rng)
    features[..., FEATURES.index("masked")] = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    features[..., [FEATURES.index(n) for n in ("time", "left", "alpha")]] = torch.tensor([0.4, 0.8, -1.2]).double()
    found = network(features)
    for row in range(2):
        logit_L, count_C = reference(network, features[row])
        torch.testing.assert_close(found.logit_BL[row], logit_L)
        torch.testing.assert_close(found.count_BC[row], count_C)


def test_a_cpu_leaves_out_what_is_decided() -> None:
    """Open positions have the logits, and parameters the gradients, of the network that computes all positions."""
    planner = new_planner(PlannerSpec(width=8, mlp=12), seed=3)
    network = planner.network.double()
    rng = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=rng)
    features = torch.rand(3, 5, len(FEATURES), dtype=torch.float64, generator=rng)
    open_BL = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    features *= open_BL[..., None]
    features[..., FEATURES.index("masked")] = open_BL.double()
    features[..., [FEATURES.index(n) for n in ("time", "left", "alpha")]] = torch.tensor([0.4, 0.8, -1.2]).double()
    counting = new_planner(PlannerSpec(width=8, mlp=12, distribution="count")).network.double()
    counting.load_state_dict(network.state_dict(), strict=False)
    weight_BL = torch.randn(3, 5, dtype=torch.float64, generator=rng) * open_BL
    found, whole = (net(features).logit_BL for net in (network, counting))
    torch.testing.assert_close(found, whole * open_BL)
    for logit_BL in (found, whole):
        (weight_BL * logit_BL).sum().backward()
    others = dict(counting.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, others[name].grad, msg=name)
    # Finished rows alone, which static shapes keep for a while, and no rows, as on a rank that waits for others.
    assert torch.equal(network(features[2:]).logit_BL, torch.zeros(1, 5, dtype=torch.float64))
    assert network(features[3:]).logit_BL.shape == (0, 5)


def reference(network: torch.nn.Module, feature_LF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of one row, as section 1.3 of the notes writes the block."""
    weights = dict(network.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    length, half = len(feature_LF), 4
    steps = feature_LF[0, FEATURES.index("time")] * length
    angles = torch.stack([steps * 10_000.0 ** (-i / half) for i in range(half)])
    encoded = torch.cat([angles.cos(), angles.sin()])
    clock = linear("clock.2", torch.nn.functional.silu(linear("clock.0", encoded)))
    rows = linear("rows", feature_LF[0, [FEATURES.index("left"), FEATURES.index("alpha")]])
    hidden = linear("enter", feature_LF[:, :7])
    given = weights["mask.weight"][feature_LF[:, FEATURES.index("masked")].long()] + clock + rows
    g1, b1, a1, g2, b2, a2 = linear("condition", given).chunk(6, dim=-1)
    normed = norm("norm_1", hidden) * (1 + g1) + b1
    query, key, value = (linear(name, normed) for name in ("query", "key", "value"))
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k = (turned(x[:, part]) for x in (query, key))
        heads.append(torch.softmax(q @ k.T / 2, dim=-1) @ value[:, part])
    hidden = hidden + (1 + a1) * linear("join", torch.cat(heads, dim=-1))
    inner = linear("up", norm("norm_2", hidden) * (1 + g2) + b2)
    hidden = hidden + (1 + a2) * linear("down", torch.nn.functional.gelu(inner))
    hidden = norm("norm_3", hidden)
    return linear("output", hidden).squeeze(-1), linear("count", hidden.mean(0))


def turned(x_L4: Tensor) -> Tensor:
    """Return RoPE of one head of width 4: the pairs (0, 1) and (2, 3) turn by 1 and 1/100 radians a position."""
    out = torch.empty_like(x_L4)
    for place in range(len(x_L4)):
        for pair, speed in enumerate((1.0, 0.01)):
            z = complex(*x_L4[place, 2 * pair : 2 * pair + 2].tolist()) * complex(
                math.cos(place * speed), math.sin(place * speed)
            )
            out[place, 2 * pair], out[place, 2 * pair + 1] = z.real, z.imag
    return out


@pytest.mark.parametrize("kind", ["transformer", "linear"])
def test_rows_are_independent_and_canvases_of_any_length_pass(kind: str) -> None:
    planner = new_planner(PlannerSpec(network=kind, width=16))
    rng = torch.Generator().manual_seed(0)
    feature_BLF = torch.rand(3, 12, len(FEATURES), generator=rng)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        planner.network(feature_BLF).logit_BL[order], planner.network(feature_BLF[order]).logit_BL
    )
    assert planner.network(feature_BLF.repeat(1, 2, 1)).logit_BL.shape == (3, 24)


def test_temperature_sharpens_the_one_distribution() -> None:
    planner = new_planner(PlannerSpec(network="linear"))
    feature_BLF, candidate_BL = torch.zeros(2, 3, len(FEATURES)), torch.ones(2, 3, dtype=torch.bool)
    found = planner.distribution(feature_BLF, candidate_BL, temperature=torch.tensor([[1.0], [0.5]]))
    torch.testing.assert_close(found.chance_BL[:, 0].exp(), torch.sigmoid(torch.tensor([-2.0, -4.0])))


def test_planners_are_read_back(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    spec = PlannerSpec(distribution="count", counts=(1, 3), width=16, features=("odds", "alpha"))
    planner = Planner(spec, new_planner(spec, seed=5).network, "abc")
    planner.save(tmp_path / "planner", task="sudoku")
    with caplog.at_level(logging.WARNING):
        for place in (tmp_path, tmp_path / "planner", tmp_path / "planner" / "planner.safetensors"):
            again = load_planner(place, fingerprint="abc")
    assert not caplog.records and again.spec == spec
    feature_BLF = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.network(feature_BLF).logit_BL, planner.network(feature_BLF).logit_BL)
    load_planner(tmp_path, fingerprint="def")
    assert "trained with denoiser abc, this one is def" in caplog.text
    (tmp_path / "planner" / "planner.safetensors").write_bytes(b"12345678")
    with pytest.raises(RecipeError, match="damaged"):
        load_planner(tmp_path)
    with pytest.raises(RecipeError, match="holds no planner"):
        load_planner(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": ["odd"]}, "Did you mean 'odds'"),
        ({"features": ["masked", "time"]}, "none of them tells positions apart"),
        ({"counts": [2, 4]}, "must begin with 1"),
        ({"counts": [1, 4, 2]}, "must begin with 1 and rise"),
        ({"heads": 3}, "do not divide"),
        ({"fallback": "argmin"}, "Did you mean 'argmax'"),
    ],
)
def test_impossible_specs_are_refused(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PlannerSpec.of(values)


def test_the_fingerprint_tells_models_apart_and_not_dtypes() -> None:
    from unmask.policies.loading import load_denoiser

    first = load_denoiser("unmask:tiny")
    found = fingerprint_of(first)
    assert found == fingerprint_of(load_denoiser("unmask:tiny", dtype="bfloat16"))
    with torch.no_grad():
        first.base.get_input_embeddings().weight[3] += 1
    assert fingerprint_of(first) != found
