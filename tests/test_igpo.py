"""IGPO's update against its formula written out in NumPy, and hints that the filter drops: their gradient is 0."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from unmask.recipes.loading import load_methods
from unmask.recipes.registry import RecipeError
from unmask.rl import advantages
from unmask.rl.likelihoods import fully_masked, random_mask
from unmask.rl.objective import Objective, build_objective
from unmask.rl.plan import Plan
from unmask.rl.weights import source, uniform
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import HINT, PAD, SAMPLED, Trajectory

L, V, MASK, EOS = 8, 3, 3, 2
S, H = SAMPLED, HINT
TOKENS = [
    [0, 1, 0, 1, 1, 0, 0, 2],  # hints at 0 to 5
    [1, 1, 0, 0, 1, 1, 0, 1],  # none
    [0, 0, 1, 2, 1, 0, 1, 1],  # hints at 0 and 1, and at 6 behind the EOS
    [1, 0, 1, 0, 0, 1, 2, 3],  # none, the last position is undecided
    [0, 0, 0, 1, 1, 1, 0, 0],  # hints everywhere
    [1, 1, 1, 1, 0, 0, 0, 2],  # none
]
SOURCE = [
    [H, H, H, H, H, H, S, S],
    [S] * 8,
    [H, H, S, S, S, S, H, S],
    [S, S, S, S, S, S, S, PAD],
    [H] * 8,
    [S] * 8,
]
PROMPT = [[1, 2], [1, 2], [1, 2], [0, 4], [0, 4], [0, 4]]
REWARD = torch.tensor([1.0, 0.0, 0.25, 0.0, 2.0, 1.0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
TEMPERATURE = 0.8


@pytest.fixture
def trajectory() -> Trajectory:
    source_BL = torch.tensor(SOURCE, dtype=torch.int8)
    born_BL = torch.where(source_BL == S, 0, -1).to(torch.int16)
    made = Trajectory(
        prompt_BQ=torch.tensor(PROMPT),
        prompt_mask_BQ=torch.ones(6, 2, dtype=torch.bool),
        tokens_BL=torch.tensor(TOKENS),
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=born_BL,
        logprob_BL=torch.where(source_BL == S, -0.5, 0.0),
        steps_B=torch.ones(6, dtype=torch.long),
        rollout_id_B=torch.arange(6),
        temperature=TEMPERATURE,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
    )
    made.validate()
    return made


def planned(objective: Objective, policy: Any, trajectory: Trajectory, advantage_B: Any, reference: Any = None) -> Plan:
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 1}}, temperature=TEMPERATURE)
    rng = torch.Generator().manual_seed(3)
    return objective.plan(policy, reference, trajectory, advantage_B, rng=rng, sampler=sampler)


def masked_logits(toy: Any) -> np.ndarray:
    """Return the logits `[6, L, V]` of each prompt's fully masked canvas, without the mask's."""
    tables = {name: value.detach().numpy() for name, value in toy.model.named_parameters()}
    return np.stack([tables["canvas"][-1] + tables["prompt"][sum(prompt) % 5] for prompt in PROMPT])[:, :, :V]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kept_tokens(logp_old: np.ndarray, share: float) -> list[list[int]]:
    """Return the positions that are learnt from: up to the EOS, and of the hints those of the largest entropy."""
    kept = []
    for b in range(6):
        end = TOKENS[b].index(EOS) + 1 if EOS in TOKENS[b] else L
        entropy = -(np.exp(logp_old[b]) * logp_old[b]).sum(-1)
        hints = sorted((i for i in range(end) if SOURCE[b][i] == H), key=lambda i: -entropy[i])
        own = [i for i in range(end) if SOURCE[b][i] == S]
        kept.append(sorted(own + hints[: max(1, int(share * len(hints)))] if hints else own))
    return kept


def numpy_igpo(
    now: np.ndarray, old: np.ndarray, reference: np.ndarray, *, share: float, beta: float, width: float
) -> tuple[float, np.ndarray]:
    """Return (loss, gradient at the logits): trajectory_rl.md section 5.2 with the filter inside the ratio."""
    logp, logp_old, logp_ref = (log_softmax(x / TEMPERATURE) for x in (now, old, reference))
    reward = REWARD.numpy().astype(np.float64)
    kept, gradient = kept_tokens(logp_old, share), np.zeros_like(now)
    mass, loss = sum(map(len, kept)), 0.0
    for b in range(6):
        a, tokens, n = reward[b] - reward[GROUP.numpy() == GROUP[b].item()].mean(), TOKENS[b], len(kept[b])
        ratio = np.exp(sum(logp[b, i, tokens[i]] - logp_old[b, i, tokens[i]] for i in kept[b]) / n)
        clipped = np.clip(ratio, 1 - width, 1 + width)
        loss -= n * min(ratio * a, clipped * a) / mass
        slope = -a * ratio / mass if ratio * a <= clipped * a else 0.0
        for i in kept[b]:
            d = logp_ref[b, i, tokens[i]] - logp[b, i, tokens[i]]
            loss += beta * (np.exp(d) - 1 - d) / mass
            at_logp = slope + beta * (1 - np.exp(d)) / mass
            gradient[b, i] += at_logp * (np.eye(V)[tokens[i]] - np.exp(logp[b, i])) / TEMPERATURE
    return loss, gradient


@pytest.mark.parametrize(("moved", "width"), [(0.0, 0.2), (0.1, 0.2), (0.6, 0.05)], ids=["fresh", "moved", "clipped"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_update_is_the_formula(
    toys: ModuleType, trajectory: Trajectory, moved: float, width: float, share: float
) -> None:
    row = load_methods()["igpo"]["objective"]
    section = {**row, "weight": {"name": "source", "share": share}, "surrogate": {**row["surrogate"]}, "chunk": 2}
    section["surrogate"] |= {"low": width, "high": width}
    policy, reference, noise = toys.Toy(1, length=L), toys.Toy(2, length=L), toys.Toy(3, length=L)
    old = masked_logits(policy)
    objective = build_objective(section)
    plan = planned(objective, policy, trajectory, advantages.group_mean(REWARD, GROUP), reference)
    with torch.no_grad():
        for p, q in zip(policy.model.parameters(), noise.model.parameters(), strict=True):
            p += moved * q
    loss, at_logits = numpy_igpo(
        masked_logits(policy), old, masked_logits(reference), share=share, beta=row["beta"], width=width
    )
    statistics = objective.backward(policy, plan)
    assert statistics["loss"] == pytest.approx(loss, abs=1e-6)
    gradients = {name: p.grad.numpy() for name, p in policy.model.named_parameters()}
    assert np.abs(at_logits).max() > 1e-2
    np.testing.assert_allclose(gradients["canvas"][-1, :, :V], at_logits.sum(0), atol=1e-6)
    assert not gradients["canvas"][:-1].any()
    by_prompt = np.zeros((5, V))
    for b, prompt in enumerate(PROMPT):
        by_prompt[sum(prompt) % 5] += at_logits[b].sum(0)
    np.testing.assert_allclose(gradients["prompt"][:, :V], by_prompt, atol=1e-6)
    assert (statistics["clip_fraction"] > 0) == (moved == 0.6)


@pytest.mark.parametrize("unit", ["token", "rollout"])
@pytest.mark.parametrize("filtered", [True, False])
def test_dropped_hints_have_no_gradient(toys: ModuleType, trajectory: Trajectory, unit: str, filtered: bool) -> None:
    """Rollout 0 alone: of its six hints one stays; at the other five positions the gradient is 0, to the bit."""
    weight = {"name": "source", "share": 0.2} if filtered else "uniform"
    section = {**load_methods()["igpo"]["objective"], "unit": unit, "weight": weight, "beta": 0.0}
    policy = toys.Toy(1, length=L)
    kept = kept_tokens(log_softmax(masked_logits(policy) / TEMPERATURE), 0.2)[0]
    objective = build_objective(section)
    plan = planned(objective, policy, trajectory, torch.tensor([1.0, *[torch.nan] * 5]))
    objective.backward(policy, plan)
    gradient_L = policy.model.canvas.grad[-1].abs().sum(dim=1)
    assert len(kept) == 3
    for position in range(L):
        assert (gradient_L[position].item() == 0.0) == (filtered and position not in kept), position


def test_hints_are_hidden_and_scored_where_the_knob_says(trajectory: Trajectory) -> None:
    with_hints = fully_masked(trajectory, rng=None, hints=True)
    without = fully_masked(trajectory, rng=None)
    assert with_hints.count_B.tolist() == [8, 8, 4, 7, 8, 8] and without.count_B.tolist() == [2, 8, 2, 7, 0, 8]
    # Hidden with the knob, also behind the EOS; context without.
    assert with_hints.canvas()[0].tolist() == [MASK] * 8 and with_hints.canvas()[2].tolist() == [MASK] * 8
    assert without.canvas()[0].tolist() == [0, 1, 0, 1, 1, 0, MASK, MASK]
    assert int(with_hints.hint_K.sum()) == 16 and not bool(without.hint_K.any())
    drawn = random_mask(trajectory, rng=torch.Generator().manual_seed(0), draws=64, hints=True)
    places = {(int(b), int(i)) for b, i in zip(drawn.row_K, drawn.position_K, strict=True)}
    assert {i for b, i in places if b == 0} == set(range(8)) and {i for b, i in places if b == 2} == {0, 1, 2, 3}


def test_weights_by_hand(trajectory: Trajectory) -> None:
    """Ties go to the earlier position; at least one hint of a view stays; share 0 drops all."""
    views = fully_masked(trajectory, rng=None, hints=True)
    entropy_K = torch.zeros(len(views.view_K))
    entropy_K[views.row_K == 0] = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.5, 9.0, 9.0])
    views = replace(views, entropy_K=entropy_K)
    weight_K, mass_B = source(views, share=0.5)
    assert weight_K[views.row_K == 0].tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    assert weight_K[views.row_K == 4].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert weight_K[views.row_K == 2].tolist() == [1, 0, 1, 1]
    assert mass_B.tolist() == [5, 8, 3, 7, 4, 8]
    kept = views.only(weight_K != 0)
    assert kept.count_B.tolist() == [5, 8, 3, 7, 4, 8] and torch.equal(kept.canvas(), views.canvas())
    assert kept.scored()[0].nonzero().squeeze(1).tolist() == [1, 3, 5, 6, 7]
    assert source(views, share=0.0)[1].tolist() == [2, 8, 2, 7, 0, 8]
    assert [row for row in views.only(source(views, share=0.0)[0] != 0).row_N.tolist()] == [0, 1, 2, 3, 5]
    assert torch.equal(source(replace(views, entropy_K=entropy_K), share=1.0)[0], uniform(views)[0])
    with pytest.raises(RecipeError, match=r"share: 1.5 must lie in \[0, 1\]"):
        source(views, share=1.5)


def test_a_token_that_several_views_keep_weighs_one(trajectory: Trajectory) -> None:
    views = random_mask(trajectory, rng=torch.Generator().manual_seed(0), draws=8, hints=True)
    entropy_K = torch.rand(len(views.view_K), generator=torch.Generator().manual_seed(1))
    weight_K, mass_B = source(replace(views, entropy_K=entropy_K), share=0.3)
    place_K = views.row_K * L + views.position_K
    total = torch.zeros(6 * L).index_add(0, place_K, weight_K)
    assert bool(((total - 1).abs() < 1e-6)[total > 0].all())
    torch.testing.assert_close(mass_B, total.view(6, L).sum(1))
