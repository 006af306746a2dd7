"""TraceRL's value model: returns and advantages by step, its loss, what it learns, and what it leaves alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cachetoys
import numpy as np
import pytest
import torch
from test_recipes import base
from torch import Tensor, nn
from toys import MASK, RULES, L, Toy, V, enumerate_paths, record

from unmask.policies.adapters import attach_adapter, lora_config
from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.recipes.loading import load_methods
from unmask.recipes.registry import RecipeError
from unmask.rl.cli_summary import _rl_facts
from unmask.rl.credit import Credit
from unmask.rl.memory import estimate
from unmask.rl.objective import build_objective
from unmask.rl.returns import step_targets, value_loss
from unmask.rl.targets import load_policy
from unmask.rl.value import Critic, ValueNetwork, ValueSettings, build_critic
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

SAMPLER = build_sampler({"schedule": {"name": "uniform", "steps": 2}})


def by_hand(
    value: list[float], reward: list[float], row: list[int], step: list[int], g: float, d: float
) -> tuple[list[float], list[float]]:
    """Return advantages and returns by the recursion of trajectory_rl.md section 6.6, in loops."""
    advantage, returned = [0.0] * len(value), [0.0] * len(value)
    for b in set(row):
        later_v = later_a = later_r = 0.0
        steps = sorted({t for t, r in zip(step, row, strict=True) if r == b})
        for t in reversed(steps):
            here = [j for j in range(len(value)) if row[j] == b and step[j] == t]
            r = reward[b] if t == steps[-1] else 0.0
            for j in here:
                returned[j] = r + g * later_r
                advantage[j] = (r - value[j]) + g * later_v + g * d * later_a
            later_v, old_v = float(np.mean([value[j] for j in here])), later_v
            later_a = r - later_v + g * old_v + g * d * later_a
            later_r = r + g * later_r
    return advantage, returned


@pytest.mark.parametrize(("g", "d"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.8), (0.5, 1.0)])
def test_advantages_by_step_are_those_of_the_recursion(g: float, d: float) -> None:
    rng = np.random.default_rng(0)
    row = np.sort(rng.integers(0, 4, 40)) + 1  # rollout 0 has no token
    step = rng.integers(0, 9, 40)
    value, reward = rng.standard_normal(40), rng.standard_normal(5)
    found = step_targets(*map(torch.from_numpy, (value, reward, row, step)), discount=g, decay=d)
    advantage, returned = by_hand(value.tolist(), reward.tolist(), row.tolist(), step.tolist(), g, d)
    np.testing.assert_allclose(found.advantage_K, advantage, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.return_K, returned, rtol=1e-12, atol=1e-12)
    if g == d == 1:  # the reference's identity
        np.testing.assert_allclose(found.advantage_K, reward[row] - value, rtol=1e-12, atol=1e-12)


def test_a_rollout_of_three_steps_by_hand() -> None:
    """Steps of one, two and one tokens; V* = 0.2, 0.4, 0.1; g = 0.5, d = 0.5; r = 1 at the last step."""
    found = step_targets(
        torch.tensor([0.2, 0.3, 0.5, 0.1]),
        torch.tensor([1.0]),
        torch.zeros(4).long(),
        torch.tensor([0, 3, 3, 7]),
        discount=0.5,
        decay=0.5,
    )
    # A*_2 = 0.9; A*_1 = -0.4 + 0.05 + 0.225 = -0.125; A*_0 = -0.2 + 0.2 - 0.03125
    expected = [-0.03125, -0.3 + 0.05 + 0.225, -0.5 + 0.05 + 0.225, 0.9]
    torch.testing.assert_close(found.advantage_K, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    assert found.return_K.tolist() == [0.25, 0.5, 0.5, 1.0]
    empty = step_targets(torch.zeros(0), torch.ones(2), torch.zeros(0).long(), torch.zeros(0).long())
    assert not len(empty.return_K)


def test_the_clipped_loss_by_hand() -> None:
    """The larger of both squares; a value beyond the clip on its return's side has no gradient."""
    value_K = torch.tensor([0.1, 0.9, -0.5, 0.3], requires_grad=True)
    loss_K = value_loss(value_K, torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, -1.0]), clip=0.2)
    torch.testing.assert_close(loss_K.detach(), 0.5 * torch.tensor([0.81, 0.64, 2.25, 1.69]))
    loss_K.sum().backward()
    torch.testing.assert_close(value_K.grad, torch.tensor([-0.9, 0.0, -1.5, 1.3]))


class States:
    """A source of hidden states that says which canvas it saw: one place for each."""

    family = SimpleNamespace(attention="full")

    def logits(self, input_ids_BT: Tensor, *, positions_BT: Tensor, padding_mask_BT: Tensor | None = None) -> Tensor:
        digit_L = torch.tensor([(V + 1) ** i for i in range(L)])
        hidden_BD = nn.functional.one_hot((input_ids_BT[:, -L:] * digit_L).sum(1), (V + 1) ** L).double()
        return hidden_BD[:, None].expand(-1, L, -1)[positions_BT[:, -L:]]


def critic_of(source: Any, width: int, optimizer: str = "SGD", **settings: Any) -> Critic:
    network = ValueNetwork(width, dtype=torch.float64)
    chosen = ValueSettings(**settings)
    return Critic(network, chosen, getattr(torch.optim, optimizer)(network.parameters(), lr=chosen.lr), source, 0.0)


def z_scores(reward: list[float], group: list[int]) -> list[float]:
    found = np.array(reward)
    for g in set(group):
        here = np.array(group) == g
        found[here] = (found[here] - found[here].mean()) / found[here].std()
    return found.tolist()


def toy_rollouts() -> tuple[Toy, Trajectory]:
    toy, prompt_BQ = Toy(4), torch.tensor([[1, 3]] * 8)
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 3}, "eos": {"rule": "stop"}})
    canvas_BL = torch.full((8, L), MASK)
    return toy, denoise(toy, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(8), seed=0)


REWARD, GROUP = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("merge", [1, 2])
def test_one_update_is_that_of_the_published_formula(merge: int) -> None:
    """Loss, advantages and new weights of a fixed batch against loops: eq. of section 6.6 under TraceRL's weights."""
    toy, rollouts = toy_rollouts()
    row = load_methods()["tracerl_value"]["objective"]
    objective = build_objective({**row, "estimator": {**row["estimator"], "merge": merge}})
    critic = critic_of(States(), (V + 1) ** L, clip=0.2, discount=0.9, decay=0.8, lr=0.5, updates=2)
    start = torch.randn((V + 1) ** L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    critic.network.head.weight.data.copy_(start)
    reward = z_scores(REWARD, GROUP)
    credit = critic.credit(toy, objective, rollouts, Credit(torch.tensor(reward, dtype=torch.float64)), SAMPLER)

    tokens: list[tuple[int, int, int, int]] = []  # rollout, position, first of the merged steps, canvas
    for b in range(8):
        born, ids = rollouts.born_BL[b].tolist(), rollouts.tokens_BL[b].tolist()
        steps = sorted({t for t in born if t >= 0})
        for first in range(0, len(steps), merge):
            seen = [v if 0 <= t < steps[first] else MASK for v, t in zip(ids, born, strict=True)]
            state = sum(v * (V + 1) ** i for i, v in enumerate(seen))
            for i in range(int(rollouts.length_B[b])):
                if born[i] in steps[first : first + merge]:
                    tokens.append((b, i, steps[first], state))
    views = defaultdict(list)
    for k, (b, _, t, _) in enumerate(tokens):
        views[b, t].append(k)
    old = [float(start[state]) for *_, state in tokens]
    b_K, t_K = [b for b, *_ in tokens], [t for _, _, t, _ in tokens]
    advantage, returned = by_hand(old, reward, b_K, t_K, 0.9, 0.8)
    assert len({b for b, *_ in tokens}) == 8 and len(views) < len(tokens) + (merge == 1)
    for (b, i, *_), expected in zip(tokens, advantage, strict=True):
        assert credit.value[b, i].item() == pytest.approx(expected, rel=1e-5)
    assert credit.by == "position" and int((~credit.value.isnan()).sum()) == len(tokens)

    weights, losses = start.numpy().copy(), []
    for _ in range(2):
        slope, loss = np.zeros_like(weights), 0.0
        for keys in views.values():
            for k in keys:
                v, r, share = weights[tokens[k][3]], returned[k], 1 / len(keys) / len(views)
                held = old[k] + min(max(v - old[k], -0.2), 0.2)
                loss += share * 0.5 * max((v - r) ** 2, (held - r) ** 2)
                slope[tokens[k][3]] += share * (v - r) * ((v - r) ** 2 >= (held - r) ** 2)
        weights -= 0.5 * slope
        losses.append(loss)
    assert critic.metrics["value/loss"] == pytest.approx(losses[0], rel=1e-5)
    np.testing.assert_allclose(critic.network.head.weight.detach()[0].numpy(), weights, rtol=1e-5, atol=1e-7)
    gap = np.array(returned) - np.array(old)
    explained = 1 - gap.var() / np.array(returned).var()
    assert critic.metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-9)


def test_sliced_values_are_those_of_each_step() -> None:
    """Block-causal models: V in one pass over [x_t ; x_0] is V on the canvas of the step, and so are advantages."""
    watched = cachetoys.load("sdar", ending=True)
    rollouts = cachetoys.rollouts(watched, None)
    policy = Denoiser(watched.model, watched.family, watched.tokenizer)
    size = watched.family.block_length
    settings = ValueSettings(discount=0.9, decay=0.7)
    reward = torch.tensor([1.0, -1.0, 0.5, 0.2])
    found = []
    for estimator in ({"name": "sliced", "size": size}, {"name": "trace"}):
        row = load_methods()["tracerl_blocks"]["objective"]
        critic = build_critic(settings, policy, {}, 1.0)
        assert critic is not None
        torch.nn.init.normal_(critic.network.head.weight, generator=torch.Generator().manual_seed(1))
        objective = build_objective({**row, "estimator": estimator})
        found.append(critic.credit(policy, objective, rollouts, Credit(reward), SAMPLER).value)
    assert not found[0].isnan().all() and len(set(rollouts.steps_B.tolist())) > 1
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5, equal_nan=True)


def test_it_learns_the_true_expected_return() -> None:
    """On a toy: V of every canvas is E[reward | canvas], by enumeration; the variance it explains is what there is."""
    toy, rule, prompt = Toy(2), RULES["confidence_1"], torch.tensor([1, 3])
    paths = enumerate_paths(toy, rule, prompt)
    rng = torch.Generator().manual_seed(3)
    reward_of = {tokens: torch.randn((), generator=rng).item() for tokens in itertools.product(range(V), repeat=L)}
    # As often as they are likely, up to rounding: the batch's own means are the expectations.
    copies = [round(1000 * path.probability.item()) for path in paths]
    kept = [path for path, count in zip(paths, copies, strict=True) for _ in range(count)]
    batch, reward_B = record(kept, rule, prompt), torch.tensor([reward_of[path.canvas] for path in kept]).double()
    parts = {"estimator": {"name": "trace", "tokens": "all"}, "unit": "token", "surrogate": "importance"}
    objective = build_objective({**parts, "weight": "uniform", "chunk": 10000})
    critic = critic_of(States(), (V + 1) ** L, "Adam", clip=1e9, updates=120)
    for lr in (0.1, 0.01, 0.001):
        critic.optimizer.param_groups[0]["lr"] = lr
        critic.credit(toy, objective, batch, Credit(reward_B), SAMPLER)
    mass, summed = defaultdict(float), defaultdict(float)
    for path in paths:
        for t in range(L):
            seen = tuple(v if path.born[i] < t else MASK for i, v in enumerate(path.canvas))
            mass[seen] += path.probability.item()
            summed[seen] += path.probability.item() * reward_of[path.canvas]
    table = critic.network.head.weight.detach()[0]
    likely = {seen: m for seen, m in mass.items() if m > 0.02}
    assert len(likely) >= 8
    for seen in likely:
        state = sum(v * (V + 1) ** i for i, v in enumerate(seen))
        assert table[state].item() == pytest.approx(summed[seen] / mass[seen], abs=0.02), seen
    # What is left is the variance that a canvas leaves open.
    critic.credit(toy, objective, batch, Credit(reward_B), SAMPLER)
    means = np.array([summed[s] / mass[s] for s in mass])
    share = np.array([mass[s] for s in mass]) / L
    variance = sum(p.probability.item() * reward_of[p.canvas] ** 2 for p in paths) - float(share @ means) ** 2
    explained = (float(share @ means**2) - float(share @ means) ** 2) / variance
    assert critic.metrics["value/explained_variance"] == pytest.approx(explained, abs=0.01)


def policy(lora: bool) -> Denoiser:
    denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64)
    return attach_adapter(denoiser, lora_config(denoiser, rank=2)) if lora else denoiser


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all weights"])
@pytest.mark.parametrize("network", ["copy", "head"])
def test_it_learns_beside_the_policy(network: str, lora: bool, tmp_path: Path) -> None:
    """Its loss falls on a batch seen again, the policy keeps weights and gradients; saved and loaded, bit for bit."""
    denoiser = policy(lora)
    before = {name: p.detach().clone() for name, p in denoiser.model.named_parameters()}
    prompt_BQ = torch.randint(0, 200, (8, 5), generator=torch.Generator().manual_seed(0))
    canvas_BL = torch.full((8, 6), denoiser.family.mask_token_id)
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 3}, "eos": {"rule": "none"}})
    rollouts = denoise(denoiser, sampler, prompt_BQ, prompt_BQ >= 0, canvas_BL, torch.arange(8), seed=0)
    objective = build_objective(load_methods()["tracerl"]["objective"] | {"estimator": "trace", "chunk": 5})
    credit = Credit(torch.tensor([1.0, -1.0, torch.nan, 0.5, 0.3, -0.2, 0.9, 0.0]))
    critics = [build_critic(ValueSettings(network, lr=1e-2, clip=10.0), denoiser, {}, 1.0) for _ in range(2)]
    one, other = critics
    assert one is not None and other is not None
    losses = []
    for _ in range(12):
        found = one.credit(denoiser, objective, rollouts, credit, sampler)
        losses.append(one.metrics["value/loss"])
    assert losses[-1] < (0.6 if network == "copy" else 0.95) * losses[0]
    assert found.applies_B.tolist() == [True, True, False, True, True, True, True, True]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in denoiser.model.named_parameters())
    one.save(tmp_path)
    other.load(tmp_path)
    again = [c.credit(denoiser, objective, rollouts, credit, sampler).value for c in (one, other)]
    assert torch.equal(*(value.nan_to_num(0.0) for value in again))
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overrides", [[], ["model.lora=null"]], ids=["adapter", "all weights"])
def test_what_a_copy_takes_in_memory(overrides: list[str]) -> None:
    """The estimate is what its weights, its gradients and Adam's moments hold; a head alone is nothing to speak of."""
    chosen = base("method=tracerl", "value={}", *overrides)
    plain, found = estimate(base("method=tracerl", *overrides)), estimate(chosen)
    denoiser = load_policy(chosen)
    if chosen.model.lora is not None:
        denoiser = attach_adapter(denoiser, lora_config(denoiser, **chosen.model.lora.model_dump()))
    critic = build_critic(ValueSettings(), denoiser, {}, 1.0)
    assert plain is not None and found is not None and critic is not None and critic.network.trunk is not None
    parameters = list(critic.network.trunk.parameters())
    held = sum(p.nbytes + 3 * p.nbytes * p.requires_grad for p in parameters)
    assert found.value == held and replace(found, value=0) == plain and found.total == plain.total + held
    assert estimate(base("method=tracerl", "value={network: head}")).value == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.estimator={name: trace, steps: uniform_k, k: 2}"], "needs every step of a rollout"),
        (["method=espo"], "needs every step of a rollout"),
        (["objective.unit=step"], "a ratio over a step has one; set unit to token"),
        (["method=cj_grpo", "objective.advantage=step_difference"], "tells steps apart"),
        (["rollout.sampler.remasking=doubt"], "decided twice"),
        (
            ["objective.estimator.merge=1", "rollout.sampler.score=sampled_confidence"],
            "choices of positions, which are actions without a token",
        ),
        (["model.sharding=fsdp"], "a copy is not shared out"),
        (["value.lr=0"], "value.lr: 0 is out of range"),
    ],
)
def test_what_cannot_have_a_value_model(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        base("method=tracerl_value", "value.decay=0.9", *overrides)


def test_check_counts_its_forwards() -> None:
    """Each batch: its values before, and one forward a view in each of its updates."""
    plain, valued = (_rl_facts(base("method=tracerl", *value), 1) for value in ([], ["value={updates: 3}"]))
    views = 8 * 2  # two views of 8 merged steps a rollout
    assert valued["forwards_an_update_at_most"] - plain["forwards_an_update_at_most"] == views * 4


def test_a_value_of_steps_is_refused() -> None:
    toy, rollouts = toy_rollouts()
    objective = build_objective(load_methods()["tracerl_value"]["objective"])
    with pytest.raises(RecipeError, match="value: it values rollouts"):
        critic_of(States(), (V + 1) ** L).credit(toy, objective, rollouts, Credit(torch.zeros(8, 3), "step"), SAMPLER)
    with pytest.raises(RecipeError, match=r"value\.network: 'own' is not one of copy, head"):
        ValueSettings("own")
