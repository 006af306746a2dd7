"""One update of each method against its published formula, written again in NumPy from the reference text.

Shared with the library are the tables of a toy and what was drawn (canvases and holes are data of the plan). The loss
is compared, and its gradient with central differences of the NumPy loss along random directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_likelihoods import rollouts
from toys import EOS, MASK, L, Toy, V

from unmask.recipes.loading import load_methods
from unmask.recipes.registry import SLOTS
from unmask.rl import advantages  # noqa: F401 (importing registers the parts)
from unmask.rl.objective import build_objective
from unmask.rl.plan import Plan
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

Array = np.ndarray
COMPLETIONS = [(0, 1, 1), (1, EOS, 0), (1, 0, 1), (0, 0, EOS), (1, 1, 0), (EOS, MASK, MASK)]
REWARD, GROUP = np.array([1.0, 0.0, 0.25, 0.0, 1.0, 0.5]), np.array([0, 0, 0, 1, 1, 1])
BATCH = replace(rollouts(COMPLETIONS), steps_B=torch.tensor([3, 3, 3, 3, 3, 1]))
ENDS = [3, 2, 3, 3, 3, 1]  # tokens up to the first EOS


class Case:
    """What a formula may read: the plan's canvases, log-probs as functions of the tables, and the advantages."""

    def __init__(self, plan: Plan, tables: dict[str, list[Array]]) -> None:
        views = plan.views
        self.row, self.canvas = views.row_N.tolist(), views.canvas().numpy()
        self.prompt, self.tokens = views.prompts().numpy(), BATCH.tokens_BL.numpy()
        self.sample = [0] * len(views) if views.sample_N is None else views.sample_N.tolist()
        self.scored, self.tables = views.scored().numpy(), tables
        # Of coupled canvases: the rate of each rollout, and which canvas it is the rate of.
        self.rate, self.first = dict[int, float](), dict[int, bool]()

    def of(self, b: int) -> list[int]:
        return [n for n, row in enumerate(self.row) if row == b]

    def f(self, which: str | list[Array], n: int, i: int) -> float:
        """Return log p of the token at position i on canvas n, the mask never drawn."""
        canvas, prompt = self.tables[which] if isinstance(which, str) else which
        state = sum(int(token) * (V + 1) ** place for place, token in enumerate(self.canvas[n]))
        logits = (canvas[state, i] + prompt[int(self.prompt[n].sum()) % 5])[:V]
        return float(logits[self.tokens[self.row[n], i]] - np.log(np.exp(logits).sum()))

    def at(self, n: int) -> list[int]:
        return [i for i in range(L) if self.scored[n, i]]

    def score(self, which: Any, n: int) -> list[float]:
        return [self.f(which, n, i) for i in range(L) if self.scored[n, i]]


def clip(rho: float, a: float, low: float, high: float) -> float:
    return -min(rho * a, min(max(rho, 1 - low), 1 + high) * a)


def k3(now: float, held: float) -> float:
    return np.exp(held - now) - (held - now) - 1


def group_mean() -> Array:
    return REWARD - np.array([REWARD[g == GROUP].mean() for g in GROUP])


def group_std(eps: float = 1e-4) -> Array:
    return group_mean() / np.array([REWARD[g == GROUP].std(ddof=1) + eps for g in GROUP])


def leave_one_out() -> Array:
    others = [[c for c in range(6) if GROUP[c] == GROUP[b] and c != b] for b in range(6)]
    return REWARD - np.array([REWARD[rows].mean() for rows in others])


def tokenwise(case: Case, now: Any, a: Array, low: float, beta: float) -> float:
    """GRPO over tokens that are scored on one canvas each (diffu-GRPO, UniGRPO, JustGRPO)."""
    total = 0.0
    for n, b in enumerate(case.row):
        for new, old, held in zip(case.score(now, n), case.score("old", n), case.score("held", n), strict=True):
            total += clip(np.exp(new - old), a[b], low, low) + beta * k3(new, held)
    return total


def diffu_grpo(case: Case, now: Any) -> float:
    return tokenwise(case, now, group_mean(), 0.5, 0.04) / sum(ENDS)


def unigrpo(case: Case, now: Any) -> float:
    return tokenwise(case, now, group_std(), 0.2, 0.01) / case.scored.sum()


def justgrpo(case: Case, now: Any) -> float:
    return tokenwise(case, now, group_std(), 0.2, 0.0) / sum(ENDS)


def cj_grpo(case: Case, now: Any) -> float:
    """Mean over rollouts of the mean over steps of the mean over a step's tokens (one token a step here)."""
    a, losses = group_mean(), []
    for b in range(6):
        steps = []
        for n in case.of(b):
            parts = zip(case.score(now, n), case.score("old", n), case.score("held", n), strict=True)
            steps.append(np.mean([clip(np.exp(x - y), a[b], 0.5, 0.5) + 0.04 * k3(x, z) for x, y, z in parts]))
        losses.append(np.mean(steps))
    return float(np.mean(losses))


def coupled_grpo(case: Case, now: Any) -> float:
    a, total = leave_one_out(), 0.0

    for b in range(6):
        # The canvas of masks alone hides every token; the others are complements, told apart by what they hide.
        hidden = {n: int(case.scored[n].sum()) for n in case.of(b)}
        full = next(n for n in case.of(b) if hidden[n] == ENDS[b])
        for i in range(ENDS[b]):
            part = next((n for n in case.of(b) if n != full and case.scored[n, i]), full)
            rate = case.rate[b] if case.first[part] else 1 - case.rate[b]
            s = {w: 0.5 * (case.f(x, full, i) + case.f(x, part, i) / rate) for w, x in
                 (("now", now), ("old", "old"), ("held", "held"))}  # fmt: skip
            total += clip(np.exp(s["now"] - s["old"]), a[b], 0.5, 0.5) + 0.01 * k3(s["now"], s["held"])
    return total / sum(ENDS)


def wd1(case: Case, now: Any) -> float:
    total = 0.0
    for g in (0, 1):
        rows = [b for b in range(6) if GROUP[b] == g]
        a = REWARD[rows] - REWARD[rows].mean()
        plus, minus = np.exp(a) / np.exp(a).sum(), np.exp(-a) / np.exp(-a).sum()
        for b, w in zip(rows, plus - minus, strict=True):
            total -= w * sum(sum(case.score(now, n)) for n in case.of(b))
    return total / 2


def elbo(case: Case, which: Any, b: int, draws: int, weigh: Callable[[int, int], float]) -> float:
    """Return the mean over draws of weight(hidden, L) x sum of log-probs."""
    return sum(weigh(len(case.score(which, n)), ENDS[b]) * sum(case.score(which, n)) for n in case.of(b)) / draws


def spg(case: Case, now: Any) -> float:
    a, total = group_mean(), 0.0
    for b in np.flatnonzero(a).tolist():  # without an advantage nothing is scored
        lower = float(np.mean([np.mean(case.score(now, n)) for n in case.of(b)]))
        inside = np.zeros(L)
        for n in case.of(b):
            rate = case.scored[n].sum() / ENDS[b]
            for i in range(L):
                if case.scored[n, i]:
                    inside[i] += np.exp(1.5 * case.f(now, n, i)) / rate / len(case.of(b))
        upper = float(np.mean(np.log(inside[inside > 0]))) / 1.5
        total -= a[b] * ENDS[b] * (lower if a[b] >= 0 else 0.5 * upper + 0.5 * lower)
    return total / sum(ENDS)


def espo(case: Case, now: Any) -> float:
    a, losses = leave_one_out(), []
    for b in range(6):
        e = {w: elbo(case, x, b, 2, lambda k, length: 0.5 * (length + 1) / k) for w, x in
             (("now", now), ("old", "old"), ("held", "held"))}  # fmt: skip
        rho = np.exp((e["now"] - e["old"]) / ENDS[b])
        losses.append(clip(rho, a[b], 0.2, 0.2) + 0.01 * 0.5 * (e["now"] - e["held"]) ** 2 / ENDS[b])
    return float(np.mean(losses))


def bgpo(case: Case, now: Any) -> float:
    a, losses = group_std(), []
    for b in range(6):
        parts = [] if a[b] else [0.0]  # without an advantage nothing is scored
        for n in case.of(b):
            weight = ENDS[b] / len(case.score(now, n))
            change = weight * (sum(case.score(now, n)) - sum(case.score("old", n))) / ENDS[b]
            parts.append(-a[b] * (1 + change if a[b] >= 0 else np.exp(change)))
        losses.append(np.mean(parts))
    return float(np.mean(losses))


def gdpo(case: Case, now: Any) -> float:
    """Gauss-Legendre on (0, 1) by its closed form for three nodes; the node of a canvas is its draw."""
    root = np.sqrt(0.6)
    nodes, weights = [(1 - root) / 2, 0.5, (1 + root) / 2], [5 / 18, 8 / 18, 5 / 18]
    a, losses = leave_one_out(), []
    for b in range(6):
        change = sum(
            weights[case.sample[n]] / nodes[case.sample[n]] * (sum(case.score(now, n)) - sum(case.score("old", n)))
            for n in case.of(b)
        )
        losses.append(clip(np.exp(change / ENDS[b]), a[b], 0.2, 0.2))
    return float(np.mean(losses))


def agrpo(case: Case, now: Any) -> float:
    """Mean over a rollout's drawn steps of the sum over a step's tokens; without an advantage nothing is scored."""
    a, losses = group_mean(), []
    for b in range(6):
        parts = [
            sum(clip(np.exp(case.f(now, n, i) - case.f("old", n, i)), a[b], 0.2, 0.2) for i in case.at(n))
            for n in case.of(b)
        ]
        assert len(parts) == (min(2, ENDS[b]) if a[b] else 0)
        losses.append(np.mean(parts) if parts else 0.0)
    return float(np.mean(losses))


def d2_stepmerge(case: Case, now: Any) -> float:
    """GRPO over tokens, each on the canvas before its part of two steps."""
    for n, b in enumerate(case.row):
        first = int((case.canvas[n] != MASK).sum())
        assert first % 2 == 0 and np.flatnonzero(case.scored[n]).tolist() == list(range(first, min(first + 2, ENDS[b])))
    return tokenwise(case, now, group_mean(), 0.5, 0.04) / sum(ENDS)


def rldf(case: Case, now: Any) -> float:
    """Mean over rollouts, steps and kept tokens: all masked ones of old probability 0.3, and the step's own."""
    z, losses, dropped = group_std(1e-8), [], 0
    for b in range(6):
        steps = []
        for n in case.of(b):
            masked = [i for i in range(ENDS[b]) if case.canvas[n, i] == MASK]
            kept = [i for i in masked if i == masked[0] or case.f("old", n, i) >= np.log(0.3)]
            dropped += len(masked) - len(kept)
            tokens = [(case.f(now, n, i), case.f("old", n, i), case.f("held", n, i)) for i in kept]
            steps.append(np.mean([clip(np.exp(x - y), z[b], 0.2, 0.2) + 0.01 * k3(x, h) for x, y, h in tokens]))
        assert len(steps) == min(2, ENDS[b])
        losses.append(np.mean(steps))
    assert dropped
    return float(np.mean(losses))


def ebpo(case: Case, now: Any) -> float:
    """Blocks of two positions: B_b / k_b a hidden token, two draws, ratio of the summed ELBO."""
    a, losses = group_std(), []
    for b in range(6):
        change = 0.0
        for n in case.of(b):
            for block in ([0, 1], [2]):
                inside = [i for i in block if i < ENDS[b]]
                hidden = [i for i in inside if case.scored[n, i]]
                for i in hidden:
                    change += len(inside) / len(hidden) * (case.f(now, n, i) - case.f("old", n, i)) / 2
        losses.append(clip(np.exp(change), a[b], 0.2, 0.2))
    return float(np.mean(losses))


CASES: dict[str, tuple[Callable[[Case, Any], float], dict[str, Any]]] = {
    "cj_grpo": (cj_grpo, {"old": "recompute"}),
    "diffu_grpo": (diffu_grpo, {}),
    "unigrpo": (unigrpo, {}),
    "coupled_grpo": (coupled_grpo, {}),
    "wd1": (wd1, {}),
    "spg": (spg, {"estimator": {"name": "blockwise", "size": 2, "draws": 2, "drop": 0.2}}),
    "espo": (espo, {}),
    "bgpo": (bgpo, {"estimator": {"name": "random_mask", "draws": 4}}),
    "gdpo": (gdpo, {}),
    "justgrpo": (justgrpo, {}),
    "agrpo": (agrpo, {"estimator": {"name": "trace", "steps": "uniform_k", "k": 2}, "old": "recompute"}),
    "d2_stepmerge": (d2_stepmerge, {"estimator": {"name": "trace", "merge": 2}}),
    "rldf": (rldf, {"estimator": {"name": "clean_state", "k": 2}, "weight": {"name": "confident", "level": 0.3}}),
    "ebpo": (ebpo, {"estimator": {"name": "block_elbo", "size": 2, "draws": 2}}),
}


class Blocks(Toy):
    """A toy whose pass over [x_t ; x_0] is that over x_t: which canvas a formula reads is all that is tested here."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.family = replace(self.family, attention="block_causal", block_length=2)

    def train_logits(self, noisy_BT: Any, clean_BT: Any, **options: Any) -> Any:
        return self.logits(noisy_BT, **options)


def tables_of(toy: Toy) -> list[Array]:
    return [parameter.detach().numpy().copy() for parameter in (toy.model.canvas, toy.model.prompt)]


def update(name: str, batch: Trajectory) -> tuple[Any, Plan, dict[str, Toy]]:
    """Return the objective, its plan under the old policy, and the policies now, then and of the reference."""
    kind = Blocks if name == "ebpo" else Toy
    old = kind(seed=3)
    now, held = copy.deepcopy(old), copy.deepcopy(old)
    with torch.no_grad():
        for toy, seed in ((now, 1), (held, 2)):
            rng = torch.Generator().manual_seed(seed)
            for parameter in toy.model.parameters():
                parameter += 0.15 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    section = load_methods()[name]["objective"] | CASES[name][1]
    advantage = SLOTS["advantage"].build(section["advantage"])
    advantage_B = advantage(torch.from_numpy(REWARD), torch.from_numpy(GROUP))
    objective = build_objective({key: value for key, value in section.items() if key not in ("advantage", "reference")})
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 1, "per_step": 1}}, temperature=1.0)
    rng = torch.Generator().manual_seed(5)
    plan = objective.plan(old, held, batch, advantage_B, rng=rng, sampler=sampler, inner=(1, 4))
    return objective, plan, {"now": now, "old": old, "held": held}


@pytest.mark.parametrize("name", CASES)
def test_update_is_the_published_one(name: str) -> None:
    objective, plan, toys = update(name, BATCH)
    case = Case(plan, {key: tables_of(toy) for key, toy in toys.items()})
    if name == "coupled_grpo":
        note_rates(case, plan)
    formula = CASES[name][0]
    statistics = objective.backward(toys["now"], plan)
    start = tables_of(toys["now"])
    assert statistics["loss"] == pytest.approx(formula(case, start), rel=1e-5, abs=1e-7)
    gradient = [parameter.grad.numpy() for parameter in (toys["now"].model.canvas, toys["now"].model.prompt)]
    rng, step = np.random.default_rng(0), 1e-5
    for _ in range(8):
        way = [rng.standard_normal(table.shape) for table in start]
        ahead, behind = ([t + s * w for t, w in zip(start, way, strict=True)] for s in (step, -step))
        slope = (formula(case, ahead) - formula(case, behind)) / (2 * step)
        ours = sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))
        assert ours == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert any(np.abs(g).max() > 1e-4 for g in gradient), "a gradient of nothing shows nothing"


@pytest.mark.parametrize("name", CASES)
def test_first_inner_step_has_ratio_one(name: str) -> None:
    """P14, P16: also with a divergence at a single inner step; and chunks change nothing (P8, P13)."""
    objective, plan, toys = update(name, BATCH)
    statistics = objective.backward(toys["old"], plan)
    if plan.old_A.any():
        assert statistics["ratio_max_deviation"] == 0.0
    whole = toys["old"].gradient()
    replace(objective, chunk=2).backward(toys["old"], plan)
    torch.testing.assert_close(toys["old"].gradient(), whole, rtol=1e-9, atol=1e-12)


def test_masked_and_truncated_corrections_by_hand() -> None:
    """Weights of units whose recomputed probability is 0.25, 1, 1.5 and 4 times the rollout's."""
    from unmask.rl.objective import _corrected

    log_ratio_U = torch.tensor([0.25, 1.0, 1.5, 4.0]).log()
    assert _corrected(log_ratio_U, name="truncated", top=2.0).tolist() == pytest.approx([0.25, 1.0, 1.5, 2.0])
    assert _corrected(log_ratio_U, name="masked", top=2.0).tolist() == pytest.approx([0.0, 1.0, 1.5, 0.0])


def note_rates(case: Case, plan: Plan) -> None:
    """Give the formula the masking rate that was drawn: factors of the first complement are 1 / (2 rate)."""
    views = plan.views
    assert views.factor_K is not None
    factor = {n: float(views.factor_K[views.view_K == n][0]) for n in range(len(views))}
    for b in range(6):
        rest = [n for n in case.of(b) if factor[n] > 0.5 + 1e-6]
        case.rate[b] = 0.5 / factor[rest[0]]
        for n in rest:
            case.first[n] = n == rest[0]
        if len(rest) == 2:
            assert 0.5 / factor[rest[1]] == pytest.approx(1 - case.rate[b], rel=1e-5)


def test_every_likelihood_row_is_here() -> None:
    rows = load_methods()
    estimated = {name for name, row in rows.items() if row["objective"]["old"] != "rollout"}
    own = {name for name in rows if name.startswith("trace")}
    assert {*estimated, "cj_grpo", "agrpo"} - own <= set(CASES) | OTHERS


# Rows that tests of their own derive: test_slices.py, test_value.py and test_igpo.py.
OTHERS = {"tracerl", "tracerl_blocks", "tracerl_value", "igpo"}
