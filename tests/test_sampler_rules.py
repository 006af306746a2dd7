"""Every selection against a plain loop over one row, written from samplers.md, on random scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS
from unmask.rollouts import rules
from unmask.rollouts.measures import Request, Statistics, measure
from unmask.rollouts.schedules import Quota
from unmask.rollouts.state import State

ROWS, L = 60, 12
Slow = Callable[[dict[int, float], int], set[int]]


def by_falling(chance: dict[int, float]) -> list[int]:
    return sorted(chance, key=lambda i: (-chance[i], i))


def slow_threshold(chance: dict[int, float], count: int) -> set[int]:
    return {i for n, i in enumerate(by_falling(chance)) if chance[i] >= 0.6 or n < count}


def slow_confident(chance: dict[int, float], count: int) -> set[int]:
    return {i for i, c in chance.items() if c >= 0.9} or set(by_falling(chance)[:count])


def slow_factor(chance: dict[int, float], count: int) -> set[int]:
    order, n = by_falling(chance), 0
    while n < len(order) and (n + 2) * (1 - chance[order[n]]) <= 1.3:
        n += 1
    return set(order[: max(n, count)])


def slow_frechet(chance: dict[int, float], count: int) -> set[int]:
    order = by_falling(chance)
    for n in range(len(order), 0, -1):
        if sum(1 - chance[i] for i in order[:n]) + (1 - chance[order[n - 1]]) <= 1.3:
            return set(order[: max(n, count)])
    return set(order[:count])


def slow_leap(chance: dict[int, float], count: int) -> set[int]:
    anchors = {i for i, c in chance.items() if c >= 0.8}
    around = {i for i, c in chance.items() if c >= 0.5 and any(abs(i - a) <= 2 for a in anchors)}
    return anchors | around | {by_falling(chance)[0]}


def slow_hierarchical(chance: dict[int, float], count: int) -> set[int]:
    taken, run = {by_falling(chance)[0]}, []
    for i in range(L + 1):
        if i in chance:
            run.append(i)
            continue
        if run:
            lead = max(run, key=lambda j: (chance[j], -j))
            taken |= {lead} if chance[lead] >= 0.5 else set()
        run = []
    return taken | {i for i, c in chance.items() if c >= 0.85}


def slow_explore(chance: dict[int, float], count: int) -> set[int]:
    ready = {i for i, c in chance.items() if c >= 0.9}
    near = {i: c for i, c in chance.items() if i < min(chance) + 4}
    return ready or set(sorted(near, key=lambda i: (near[i], i))[:2])


STATELESS: dict[str, tuple[dict[str, float], Slow]] = {
    "top": ({}, lambda chance, count: set(by_falling(chance)[:count])),
    "all": ({}, lambda chance, count: set(chance)),
    "threshold": ({"level": 0.6}, slow_threshold),
    "confident": ({"level": 0.9}, slow_confident),
    "factor": ({"f": 1.3}, slow_factor),
    "frechet": ({"f": 1.3}, slow_frechet),
    "local_leap": ({"level": 0.8, "relaxed": 0.5, "radius": 2}, slow_leap),
    "hierarchical": ({"level": 0.85, "low": 0.5}, slow_hierarchical),
    "explore": ({"level": 0.9, "probes": 2, "near": 4}, slow_explore),
}


def tables(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Return random probabilities (some tied), windows of every size from 1, and counts."""
    rng = torch.Generator().manual_seed(seed)
    chance_BL = torch.rand(rows, L, generator=rng, dtype=torch.float64) ** torch.tensor([0.2, 1.0, 3.0])[
        torch.arange(rows) % 3
    ].unsqueeze(1)
    chance_BL[rows // 2 :] = (chance_BL[rows // 2 :] * 8).round() / 8 + 0.01
    window_BL = torch.rand(rows, L, generator=rng) < torch.rand(rows, 1, generator=rng)
    window_BL[:, 3] |= ~window_BL.any(dim=1)
    return chance_BL.clamp(max=0.999), window_BL, torch.randint(1, 5, (rows,), generator=rng)


def rows_of(chosen_BL: Tensor) -> list[set[int]]:
    return [set(row.nonzero().squeeze(1).tolist()) for row in chosen_BL]


def chances(chance_BL: Tensor, window_BL: Tensor) -> list[dict[int, float]]:
    return [{i: chance_BL[b, i].item() for i in range(L) if window_BL[b, i]} for b in range(len(chance_BL))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", STATELESS)
def test_selections_equal_a_loop_over_one_row(name: str, seed: int) -> None:
    knobs, slow = STATELESS[name]
    chance_BL, window_BL, count_B = tables(seed)
    score_BL = chance_BL.log().masked_fill(~window_BL, -torch.inf)
    found_BL = SLOTS["selection"].build({"name": name, **knobs})(score_BL, Quota(window_BL, count_B))
    pairs = zip(chances(chance_BL, window_BL), count_B.tolist(), strict=True)
    expected = [slow(chance, count) & set(chance) for chance, count in pairs]
    assert rows_of(found_BL) == expected
    assert name in ("all", "top") or len(set(map(len, expected))) > 3, "the rule takes now few, now many"


def test_factor_stops_before_a_last_position_that_fails() -> None:
    """samplers.md 2.4: ports return one too many when the loop breaks at the last index, one too few when it does not.

    Bars 1/2, 2/3, 3/4: with 0.99, 0.99, 0.5 the third fails; with 0.8 in its place all pass.
    """
    window_BL = torch.ones(2, 3, dtype=torch.bool)
    score_BL = torch.tensor([[0.99, 0.5, 0.99], [0.99, 0.8, 0.99]]).log()
    factor = SLOTS["selection"].get("factor")
    assert factor(score_BL, Quota(window_BL, torch.ones(2).long())).tolist() == [[True, False, True], [True] * 3]


def test_frechet_takes_what_factor_takes_and_more() -> None:
    chance_BL, window_BL, _ = tables(9, rows=300)
    score_BL = chance_BL.log().masked_fill(~window_BL, -torch.inf)
    quota = Quota(window_BL, torch.ones(300).long())
    factor_BL, frechet_BL = (SLOTS["selection"].get(name)(score_BL, quota) for name in ("factor", "frechet"))
    assert not (factor_BL & ~frechet_BL).any()
    assert frechet_BL.sum() > 1.05 * factor_BL.sum()
    equal_BL = torch.full((1, L), 0.83).log()
    one = Quota(torch.ones(1, L, dtype=torch.bool), torch.ones(1).long())
    for name in ("factor", "frechet"):
        # (n + 1) 0.17 <= 1 for n <= 4.
        assert SLOTS["selection"].get(name)(equal_BL, one).sum() == 4


# --- Rules that read more than the score ------------------------------------------------------------------------------


def state_of(window_BL: Tensor, statistics: Statistics | None = None) -> State:
    state = State.of(torch.where(window_BL, -1, 0), -1)
    state.statistics = statistics
    return state


def statistics_of(**fields: Tensor) -> Statistics:
    rows, columns = next(iter(fields.values())).shape[:2]
    return Statistics.blank(rows, columns)._replace(**fields)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", ["entropy", "another proxy"])
def test_entropy_budget_equals_a_loop(order: str, seed: int) -> None:
    chance_BL, window_BL, count_B = tables(seed)
    entropy_BL = -2 * chance_BL.log()
    score_BL = -entropy_BL if order == "entropy" else chance_BL.roll(1, dims=1).log()
    state = state_of(window_BL, statistics_of(entropy=entropy_BL.masked_fill(~window_BL, -torch.inf)))
    part = SLOTS["selection"].build({"name": "entropy_budget", "nats": 0.7})
    found_BL = part(score_BL.masked_fill(~window_BL, -torch.inf), Quota(window_BL, count_B), state=state)
    for b, chosen in enumerate(rows_of(found_BL)):
        positions = by_falling({i: score_BL[b, i].item() for i in range(L) if window_BL[b, i]})
        best = 0
        for k in range(1, len(positions) + 1):
            first = [entropy_BL[b, i].item() for i in positions[:k]]
            best = k if sum(first) - max(first) <= 0.7 else best
        assert chosen == set(positions[: max(best, int(count_B[b]))])


def test_one_uncertain_position_does_not_use_up_the_entropy_budget() -> None:
    """samplers.md 2.6: sum H - max H of 0.01, 0.02, 5.0 is 0, 0.01, 0.03; without "- max H" the third is refused."""
    entropy_BL = torch.tensor([[5.0, 0.01, 0.02]])
    window_BL = torch.ones(1, 3, dtype=torch.bool)
    part = SLOTS["selection"].build({"name": "entropy_budget", "nats": 0.1})
    state = state_of(window_BL, statistics_of(entropy=entropy_BL))
    assert part(-entropy_BL, Quota(window_BL, torch.ones(1).long()), state=state).all()


def test_running_threshold_equals_a_loop() -> None:
    chance_BL, window_BL, count_B = tables(3)
    committed_BL = torch.where(window_BL, torch.nan, chance_BL.flip(1))
    committed_BL[:, :4] = torch.nan
    state = replace(state_of(window_BL), committed_AL=committed_BL.log())
    score_BL = chance_BL.log().masked_fill(~window_BL, -torch.inf)
    found_BL = SLOTS["selection"].get("running_threshold")(score_BL, Quota(window_BL, count_B), state=state)
    alone = 0
    for b, (chosen, chance) in enumerate(zip(rows_of(found_BL), chances(chance_BL, window_BL), strict=True)):
        past = [c for c in committed_BL[b].tolist() if not math.isnan(c)]
        bar = sum(past) / len(past) if past else 1.0
        alone += not past
        assert chosen == {i for i, c in chance.items() if c > bar} | set(by_falling(chance)[: int(count_B[b])])
    assert 0 < alone < ROWS


def slow_klass(history: list[list[list[float]]], chance: dict[int, float], count: int) -> set[int]:
    """KLASS over full distributions; `history[t][i]` is that of position i at step t, the last one the present."""

    def drift(now: list[float], past: list[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(now, past, strict=True))

    ready = set()
    for i, c in chance.items():
        pairs = list(itertools.pairwise([step[i] for step in history]))[-2:]
        if len(pairs) == 2 and all(drift(now, past) < 0.02 for past, now in pairs) and c >= 0.6:
            ready.add(i)
    return ready or set(by_falling(chance)[:count])


@pytest.mark.parametrize("seed", range(3))
def test_stable_equals_a_loop_over_whole_distributions(seed: int) -> None:
    """With 7 tokens all are kept, so that the divergence is exact; the window stays the same for 6 steps."""
    rng = torch.Generator().manual_seed(seed)
    _, window_BL, count_B = tables(seed)
    state, histories = state_of(window_BL), [[] for _ in range(ROWS)]
    part = SLOTS["selection"].build({"name": "stable", "level": 0.6, "drift": 0.02, "steps": 2})
    logits_BLV = 2 * torch.randn(ROWS, L, 7, generator=rng, dtype=torch.float64)
    sizes = set()
    for _ in range(6):
        logits_BLV = logits_BLV + 0.25 * torch.randn(ROWS, L, 7, generator=rng, dtype=torch.float64)
        noise_K = torch.full((ROWS * L,), 0.5, dtype=torch.float64)
        request = Request(1.0, 1.0, (), needs=frozenset(("top",)))
        found = measure(logits_BLV.flatten(0, 1).clone(), noise_K, request).table(torch.arange(ROWS * L), ROWS, L)
        state.statistics = found
        score_BL = found.confidence.masked_fill(~window_BL, -torch.inf)
        chosen_BL = part(score_BL, Quota(window_BL, count_B), state=state)
        p_BLV = logits_BLV.softmax(dim=2)
        for b, chosen in enumerate(rows_of(chosen_BL)):
            histories[b].append(p_BLV[b].tolist())
            chance = {i: p_BLV[b, i].max().item() for i in range(L) if window_BL[b, i]}
            assert chosen == slow_klass(histories[b], chance, int(count_B[b]))
            sizes.add((len(histories[b]) > 2, len(chosen) - min(int(count_B[b]), len(chance))))
    assert {size for late, size in sizes if not late} == {0}, "a history of two divergences takes three steps"
    assert min(sizes)[1] == 0 and max(sizes)[1] > 0 and any(size < 0 for _, size in sizes)


def test_the_divergence_is_bounded_from_below() -> None:
    """200 tokens, of which 64 are kept: never above KL(p | past), and close where the mass lies in the list."""
    rng = torch.Generator().manual_seed(1)
    past_KV = 2.5 * torch.randn(400, 200, generator=rng)
    now_KV = past_KV + torch.randn(400, 200, generator=rng) * torch.linspace(0, 2, 400)[:, None]
    noise_K, request = torch.full((400,), 0.5, dtype=torch.float64), Request(1.0, 1.0, (), needs=frozenset(("top",)))
    lists = [measure(table.clone(), noise_K, request).table(torch.arange(400), 400, 1) for table in (past_KV, now_KV)]
    assert lists[0].top.shape == (400, 1, 64)
    token_KL, order = lists[0].top_token.sort(dim=2)
    found_K = rules.drift_bound(lists[1], token_KL, lists[0].top.gather(2, order)).squeeze(1)
    p_KV, q_KV = now_KV.double().log_softmax(1), past_KV.double().log_softmax(1)
    exact_K = (p_KV.exp() * (p_KV - q_KV)).sum(dim=1)
    assert (found_K <= exact_K + 1e-6).all()
    assert (found_K[200:] >= 0.6 * exact_K[200:]).all()
    assert (found_K[:1].abs() < 1e-6).all(), "nothing moved"


class SlowFast:
    """One row of SlowFast as its paper says it, step by step."""

    def __init__(self) -> None:
        self.end, self.ends, self.block_end = None, [], -1

    def step(self, chance: dict[int, float]) -> set[int]:
        if min(chance) > self.block_end:
            self.end, self.ends = None, []
        self.block_end = max(chance)
        if self.end is not None and not any(i < self.end for i in chance):
            self.end, self.ends = None, []
        region = chance if self.end is None else {i: c for i, c in chance.items() if i < self.end}
        if self.end is None:
            ripe = [i for i, c in chance.items() if c >= 0.3]
            self.ends.append(max(ripe, default=min(chance)) + 1)
            last = self.ends[-2:]
            if len(last) == 2 and abs(last[0] - last[1]) / 2 < 1:
                self.end = last[1]
            elif len(self.ends) == 3:
                self.end = sum(last) // 2
        return {i for i, c in region.items() if c >= 0.8} | {by_falling(region)[0]}


@pytest.mark.parametrize("seed", range(4))
def test_slow_fast_equals_a_row_by_itself(seed: int) -> None:
    """Two blocks of 12, filled to the end, with new scores at every step."""
    rng = torch.Generator().manual_seed(seed)
    masked_BL = torch.rand(20, 24, generator=rng) < 0.9
    masked_BL[:, [0, 12]] = True
    part = SLOTS["selection"].build({"name": "slow_fast", "level": 0.8, "reach": 0.3, "explore": 3, "spread": 1.0})
    machines, state, kinds = [SlowFast() for _ in range(20)], state_of(masked_BL), set()
    for _ in range(24):
        first_BL = torch.where(masked_BL[:, :12].any(1, keepdim=True), torch.arange(24) < 12, torch.arange(24) >= 12)
        window_BL = masked_BL & first_BL
        # Steps at which most passes, and steps at which little does.
        power_B1 = 3 * torch.rand(20, 1, generator=rng, dtype=torch.float64) ** 2
        score_BL = (torch.rand(20, 24, generator=rng, dtype=torch.float64) ** power_B1).log()
        chosen_BL = part(
            score_BL.masked_fill(~window_BL, -torch.inf), Quota(window_BL, torch.ones(20).long()), state=state
        )
        for b, machine in enumerate(machines):
            if window_BL[b].any():
                chance = {i: score_BL[b, i].exp().item() for i in range(24) if window_BL[b, i]}
                assert set(chosen_BL[b].nonzero().squeeze(1).tolist()) == machine.step(chance)
                kinds.add((machine.end is None, len(machine.ends)))
        masked_BL = masked_BL & ~chosen_BL
    assert not masked_BL.any()
    assert {n for slow, n in kinds if slow} == {1, 2} and {n for slow, n in kinds if not slow} == {2, 3}


def test_slow_fast_starts_anew_where_a_slow_step_fills_its_own_stretch() -> None:
    """The second step finds the end at 3 and fills all before it; the third begins a cycle, the fourth is slow too."""
    part = SLOTS["selection"].build({"name": "slow_fast", "level": 0.8, "reach": 0.3, "explore": 3})
    masked_BL, taken = torch.ones(1, 6, dtype=torch.bool), []
    state = state_of(masked_BL)
    for chance in (
        [0.5, 0.1, 0.4, 0.1, 0.1, 0.1],
        [0.0, 0.9, 0.9, 0.1, 0.1, 0.1],
        [0.0, 0.0, 0.0, 0.1, 0.4, 0.1],
        [0.0, 0.0, 0.0, 0.2, 0.0, 0.25],
    ):
        score_BL = torch.tensor([chance]).log().masked_fill(~masked_BL, -torch.inf)
        chosen_BL = part(score_BL, Quota(masked_BL, torch.ones(1).long()), state=state)
        taken += rows_of(chosen_BL)
        masked_BL = masked_BL & ~chosen_BL
    assert taken == [{0}, {1, 2}, {4}, {5}]
